"""`bench quality`: real pictures get full marks, bad ones do not, and sampling in batches is the runtime's sampling."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest

from fewstep.models.bundle import load_bundle
from fewstep.models.spec import QualityRow
from fewstep.runtime.engines.fake_engine import FakeEngine, Fault, fake_bundle
from fewstep.runtime.engines.torch_engine import TorchEngine
from fewstep.runtime.errors import InvalidRequest
from fewstep.runtime.sampling.loop import run_request
from fewstep.runtime.sampling.request import GenerateRequest
from fewstep.trainers.pictures import grids, quality, scenes
from tiny import copy_bundle

PROMPTS = 64


def drawn(captions, rng: random.Random) -> np.ndarray:
    return np.stack([np.asarray(scenes.render(scenes.sample_like(caption, rng))) for caption in captions])


@pytest.fixture(scope="module")
def prompt_set():
    return quality.draw_prompts(PROMPTS, seed=3)


def test_a_scene_of_a_caption_meets_it_and_is_another():
    rng = random.Random(0)
    for _ in range(200):
        sample = scenes.sample(rng)
        one, two = (scenes.sample_like(sample.caption, rng) for _ in range(2))
        assert one != two
        for scene in (one, two):
            centres = [(o.x, o.y) for o in scene.objects]
            assert scenes.holds(sample.caption.relation, centres)
            assert scene.background == sample.caption.background or sample.caption.background is None
            for claim, thing in zip(sample.caption.objects, scene.objects, strict=True):
                assert (claim.shape, claim.colour) == (thing.shape, thing.colour)
                assert claim.size in (None, thing.size)
        if len(set(sample.caption.objects)) == 1:
            assert len({o.size for o in one.objects}) == 1


def test_real_pictures_get_full_marks(prompt_set):
    rng = random.Random(5)
    more = drawn([c for c in prompt_set.captions[:32] for _ in range(3)], rng)
    figures = quality.measure(prompt_set, drawn(prompt_set.captions, rng), more)
    assert figures.compliance >= 0.99 and figures.strict >= 0.97
    assert figures.diversity == pytest.approx(1, abs=0.1)
    shuffled = quality.measure(prompt_set, np.flip(drawn(prompt_set.captions, rng), axis=0), more)
    assert shuffled.compliance < 0.5 and shuffled.strict < 0.1
    # a set of pictures is the same set in any order: only compliance looks at single captions
    assert shuffled.frechet == pytest.approx(figures.frechet, rel=0.3)
    assert quality.measure_data(prompt_set).frechet == pytest.approx(figures.frechet, rel=0.3)
    noise = np.random.default_rng(0).integers(0, 256, (PROMPTS, 64, 64, 3), dtype=np.uint8)
    bad = quality.measure(prompt_set, noise, noise[: 3 * 8])
    assert bad.frechet > 3 * figures.frechet
    assert bad.compliance < 0.3 and bad.strict == 0


def test_pictures_of_another_size_are_measured(prompt_set):
    rng = random.Random(6)
    big = np.stack([np.kron(p, np.ones((2, 2, 1), np.uint8)) for p in drawn(prompt_set.captions, rng)])
    figures = quality.measure(prompt_set, big, np.repeat(big[:8], 3, axis=0))
    assert figures.compliance >= 0.99
    assert figures.diversity == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["tiny_teacher", "tiny_lcm", "tiny_dmd2"])
def test_a_batch_makes_the_pictures_of_the_dull_loop(name, request):
    bundle = request.getfixturevalue(name)
    engine = TorchEngine(bundle)
    words, seeds = ["red ring", "blue star", "a cross"], [4, 9, 1]
    made = quality.sample_pictures(bundle, words, seeds, 4, batch=2, engine=engine)
    assert made.shape == (3, 32, 32, 3)
    for text, seed, picture in zip(words, seeds, made, strict=True):
        (alone,) = run_request(engine, bundle, GenerateRequest(prompt=text, seed=seed, steps=4)).pictures
        assert np.abs(alone.astype(int) - picture).max() <= 1


def test_an_engine_is_opened_where_none_is_given(tiny_dmd2):
    own = quality.sample_pictures(tiny_dmd2, ["red ring"], [4], 1)
    given = quality.sample_pictures(tiny_dmd2, ["red ring"], [4], 1, engine=TorchEngine(tiny_dmd2))
    assert np.array_equal(own, given)


def test_one_broken_picture_stops_the_measurement():
    bundle = fake_bundle()
    engine = FakeEngine(bundle.spec, faults={("denoiser", 1): Fault("nan", rows=(1,))})
    with pytest.raises(Exception, match="non-finite"):
        quality.sample_pictures(bundle, ["a", "b"], [0, 1], 4, engine=engine)


def test_a_measured_row_says_what_was_run(prompt_set):
    bundle = fake_bundle()
    measured = quality.measure_bundle(bundle, 2, prompt_set, guidance=5.0, engine=FakeEngine(bundle.spec, max_batch=64))
    row = measured.row
    assert (row.steps, row.nfe, row.guidance, row.pictures) == (2, 2, 5.0, PROMPTS)
    assert 0 <= measured.strict <= row.compliance < 0.6
    assert row.frechet > 1 and measured.seconds > 0


def test_bad_questions_are_refused(tiny_dmd2):
    with pytest.raises(InvalidRequest, match="prompts is 3"):
        quality.draw_prompts(3)
    with pytest.raises(InvalidRequest, match="steps is 3"):
        quality.sample_pictures(tiny_dmd2, ["a"], [0], 3)
    with pytest.raises(ValueError, match="captions have"):
        quality.sample_pictures(tiny_dmd2, ["a"], [0, 1], 1)
    with pytest.raises(InvalidRequest, match=r"tiny-dmd2 was made for 1, 2, 4, 8"):
        quality.command([str(tiny_dmd2.root), "--steps", "3,25"])
    with pytest.raises(SystemExit) as stop:
        quality.command([str(tiny_dmd2.root), "--steps", "four"])
    assert stop.value.code == 2


def row(steps: int, compliance: float = 0.5, guidance: float = 1.0) -> QualityRow:
    return QualityRow(
        steps=steps, nfe=steps, guidance=guidance, frechet=1.0, compliance=compliance, diversity=1.0, pictures=8
    )


def test_new_rows_replace_old_ones():
    old = (row(1), row(4), row(4, guidance=3.0))
    assert quality.merge_rows(old, [row(4, 0.9), row(2)]) == (row(1), row(2), row(4, 0.9), row(4, guidance=3.0))


def test_the_command_writes_figures_and_curve(tiny_teacher, tiny_lcm, tmp_path, capsys, short_prompts):
    copies = [copy_bundle(b, tmp_path / b.name) for b in (tiny_teacher, tiny_lcm)]
    file = tmp_path / "quality.json"
    argv = [*map(str, copies), "--steps", "1,2,3", "--prompts", "8", "--quiet", "--write", "--json", str(file)]
    assert quality.command(argv) == 0
    said = capsys.readouterr()
    assert "| tiny-lcm" in said.out and "tiny-lcm: was not made for 3 steps" in said.out
    report = json.loads(file.read_text())
    rows = report["rows"]
    assert [(r["model"], r["steps"], r["nfe"]) for r in rows] == [
        ("tiny-teacher", 1, 2), ("tiny-teacher", 2, 4), ("tiny-teacher", 3, 6), ("tiny-lcm", 1, 1), ("tiny-lcm", 2, 2),
    ]  # fmt: skip
    assert {"model", "steps", "frechet", "compliance", "diversity", "nfe", "strict", "engine"} <= set(rows[0])
    assert report["data"]["compliance"] > 0.9 and "real scenes" in said.out
    curve = load_bundle(copies[1]).spec.quality
    assert [(r.steps, r.frechet, r.compliance) for r in curve] == [
        (r["steps"], r["frechet"], r["compliance"]) for r in rows[3:]
    ]
    assert load_bundle(copies[1]).weights_digest == tiny_lcm.weights_digest


def test_an_engines_figures_go_into_its_manifest(tiny_dmd2, tmp_path, capsys, short_prompts, monkeypatch):
    from fewstep.runtime.engines.manifest import Manifest, Parity, read_manifest, write_manifest

    bundle = load_bundle(copy_bundle(tiny_dmd2, tmp_path / "dmd2"))
    passed = Parity(component="text", max_relative_error=0.0, tolerance=0.05, ok=True)
    fixed = {"precision": "int8", "opset": 21, "roles": {}, "producers": {}, "weights_digest": bundle.weights_digest}
    write_manifest(bundle, Manifest(engine="onnx-int8", parity=(passed,), budget={"frechet": 0.5}, **fixed))
    sampled = quality._measure_steps

    def measured(bundle, steps, prompt_set, guidance, engine, progress):
        """Torch's figures, and for the engine the same with a distance worse by 2."""
        found = sampled(bundle, steps, prompt_set, guidance, "torch", progress)
        if engine == "torch":
            return found
        return [replace(one, row=replace(one.row, frechet=one.row.frechet + 2)) for one in found]

    monkeypatch.setattr(quality, "_measure_steps", measured)
    argv = [str(bundle.root), "--steps", "1", "--prompts", "8", "--quiet", "--engine", "onnx-int8", "--write"]
    assert quality.command(argv) == 1
    assert "onnx-int8 is refused: tiny-dmd2: frechet at 1 steps" in capsys.readouterr().err
    kept = read_manifest(bundle, "onnx-int8")
    assert not kept.verified and kept.quality["steps"]["1"]["frechet_change"] == 2.0
    assert load_bundle(bundle.root).spec.quality == bundle.spec.quality


def test_json_to_standard_output_is_json_alone(tiny_dmd2, capsys, short_prompts):
    assert quality.command([str(tiny_dmd2.root), "--steps", "1", "--prompts", "8", "--quiet", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["model"] == "tiny-dmd2"


def test_usual_steps_of_students_and_teachers(tiny_teacher, tiny_lcm, short_prompts):
    assert [r.steps for r in quality.evaluate(tiny_lcm, prompts=8)] == [1, 2, 4]
    assert quality._steps_of(tiny_teacher, None) == [4, 25]


def test_contact_sheets_hold_every_picture():
    rng = random.Random(2)
    samples = [scenes.sample(rng) for _ in range(5)]
    pictures = [np.asarray(scenes.render(s.scene)) for s in samples]
    texts = [s.caption.text for s in samples]
    sheet = np.asarray(grids.contact_sheet(pictures, columns=3, scale=1))
    assert sheet.shape == (2 * 70 + 6, 3 * 70 + 6, 3)
    for k, picture in enumerate(pictures):
        x, y = 6 + k % 3 * 70, 6 + k // 3 * 70
        assert np.array_equal(sheet[y : y + 64, x : x + 64], picture)
    captioned = grids.contact_sheet(pictures, texts, columns=3)
    assert captioned.height > 2 * (128 + 6) + 6 and (np.asarray(captioned)[140:160] < 100).any()
    both = np.asarray(grids.comparison_sheet({"teacher\n25": pictures, "lcm 1": pictures[::-1]}, texts, scale=1))
    assert any(np.array_equal(both[6:70, x : x + 64], pictures[0]) for x in range(both.shape[1] - 64))


def test_sheets_that_cannot_be_are_refused():
    picture = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="at least one"):
        grids.contact_sheet([])
    with pytest.raises(ValueError, match="2 captions"):
        grids.contact_sheet([picture], ["a", "b"])
    with pytest.raises(ValueError, match="each of the 2 captions"):
        grids.comparison_sheet({"a": [picture]}, ["x", "y"])
