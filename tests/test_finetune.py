"""Fine-tuning after distillation: blended batches, the gate's two measures, a whole small run, what is refused."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.models.bundle import load_bundle
from fewstep.trainers.bench.finetune import denoised
from fewstep.trainers.errors import DataError, RecipeError
from fewstep.trainers.networks.student import load_denoiser
from fewstep.trainers.pictures import quality, scenes
from fewstep.trainers.pictures.blending import Blend, BlendedSource, joined, old_domain
from fewstep.trainers.pictures.cutouts import cut_outs, write_folder
from fewstep.trainers.pictures.data import Latents, LatentSource, read_metadata
from fewstep.trainers.pictures.quality import PromptSet
from fewstep.trainers.recipes.finetune import finetune_student
from fewstep.trainers.runs import finetune_gate
from fewstep.trainers.runs.finetune import by_carrying, carried, command, finetune, settings_of, with_networks
from fewstep.trainers.runs.finetune_gate import GateRow, Judge, Limits, Shown, gap, report_rows, table, way
from tiny import tiny_latents

FAST = {"batch": 4, "steps": 2, "tune_steps": 2, "rank": 2, "picture_every": 0, "checkpoint_every": 0, "bf16": False}


def pictures_in(folder, count, colour):
    folder.mkdir()
    rows = []
    for k in range(count):
        Image.new("RGB", (32, 32), (colour, 40 * k, 90)).save(folder / f"{k}.png")
        rows.append(json.dumps({"file_name": f"{k}.png", "text": "a red circle"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    return pictures_in(root / "own", 3, 200), pictures_in(root / "old", 4, 20)


@pytest.fixture(scope="module")
def tuned(tiny_lcm, tiny_teacher, folders, tmp_path_factory):
    own, old = folders
    out = tmp_path_factory.mktemp("tuned") / "mine"
    changes = FAST | {"prior": str(old), "lr": 0.05, "tune_lr": 0.05}
    return finetune(tiny_lcm, own, tiny_teacher, out, changes, device="cpu")


def weights(bundle):
    return load_denoiser(bundle).state_dict()


def test_a_tuned_student_keeps_its_contract_and_has_its_lora_beside(tuned, tiny_lcm):
    student, _ = tuned
    ours, theirs = student.spec, tiny_lcm.spec
    for name in ("sampler", "grids", "guidance", "boundary", "path", "prediction"):
        kept = getattr(ours, name)
        wanted = getattr(theirs, name)
        assert kept == wanted, name
    mine, start = weights(student), weights(tiny_lcm)
    assert set(mine) == set(start)
    changed = [name for name, value in mine.items() if (value - start[name]).abs().max() > 1e-3]
    assert changed and all("conv" in n or "to_" in n or "proj" in n or "ff" in n for n in changed)
    assert (student.root / "pytorch_lora_weights.safetensors").is_file()
    assert ours.recipe == "finetune-student"


def test_the_teacher_that_learned_the_pictures_is_kept(tuned, tiny_teacher):
    _, teacher = tuned
    was, now = weights(tiny_teacher), weights(teacher)
    assert teacher.spec.guidance == tiny_teacher.spec.guidance and set(was) == set(now)
    assert any((now[name] - was[name]).abs().max() > 1e-3 for name in was)
    assert (teacher.root / "pytorch_lora_weights.safetensors").is_file()


def test_a_lora_is_carried_over_layer_by_layer(tuned, tiny_lcm, tiny_teacher, tiny_dmd2, tmp_path):
    _, teacher = tuned
    made = carried(tiny_lcm, tiny_teacher, teacher, tmp_path / "carried")
    mine, start, was, now = (weights(bundle) for bundle in (made, tiny_lcm, tiny_teacher, teacher))
    for name, value in start.items():
        wanted = value + (now[name] - was[name] if name in was else 0.0)
        assert torch.allclose(mine[name], wanted, atol=2e-3), name
    with pytest.raises(RecipeError, match="of the shape in"):
        carried(tiny_teacher, tiny_lcm, tiny_lcm, tmp_path / "odd")
    assert load_bundle(made.root).spec.grids == tiny_lcm.spec.grids


def test_by_default_the_teachers_lora_is_carried_over(tiny_lcm, tiny_teacher, folders, tmp_path):
    made, teacher = by_carrying(tiny_lcm, folders[0], tiny_teacher, tmp_path / "mine", FAST, device="cpu")
    assert made.spec.grids == tiny_lcm.spec.grids and made.spec.guidance == tiny_lcm.spec.guidance
    assert teacher.spec.guidance == tiny_teacher.spec.guidance and teacher.root.name == "mine-teacher"
    for bundle in (made, teacher):
        assert (load_bundle(bundle.root).root / "pytorch_lora_weights.safetensors").is_file()
    assert any((now != was).any() for now, was in zip(weights(made).values(), weights(tiny_lcm).values(), strict=True))


def test_plain_denoising_is_there_to_compare_with(tiny_lcm, tiny_teacher, folders, tmp_path):
    made = denoised(tiny_lcm, folders[0], tiny_teacher, tmp_path / "plain", FAST)
    assert made.spec.recipe == "denoised" and set(weights(made)) == set(weights(tiny_lcm))


def test_blended_rows_have_the_shares_asked_for(tiny_teacher, folders):
    data = tiny_latents(tiny_teacher)
    source = LatentSource(data, tiny_teacher.text_encoder(), 64, spec=tiny_teacher.spec)
    plan = Blend(others=0.75, dropped=0.5, prior=str(folders[1]))
    blended = BlendedSource(source, plan, tiny_teacher)
    old = torch.cat([blended.choose(step)[:, 0] >= len(data) for step in range(20)]).float().mean()
    assert float(old) == pytest.approx(0.75, abs=0.04)
    batch = blended.batch(0)
    told = (batch.cond["ctx"] != batch.uncond["ctx"]).flatten(1).any(1).float().mean()
    assert float(told) == pytest.approx(0.5, abs=0.2)
    assert torch.equal(batch.x0, blended.batch(0).x0) and not torch.equal(batch.x0, blended.batch(1).x0)
    alone = BlendedSource(source, Blend(), tiny_teacher)
    assert int(alone.choose(3)[:, 0].max()) < len(data)


def test_the_old_domain_may_be_prompts_that_the_teacher_draws(tiny_teacher, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a b\n\nred\n")
    drawn = old_domain(Blend(others=0.5, prior=str(prompts), count=3), tiny_teacher, 0)
    assert drawn.latents.shape == (3, 4, 16, 16) and torch.isfinite(drawn.latents.float()).all()
    assert torch.equal(drawn.ids[0], drawn.ids[2]) and not torch.equal(drawn.ids[0], drawn.ids[1])
    prompts.write_text("\n")
    with pytest.raises(DataError, match="no prompts"):
        old_domain(Blend(prior=str(prompts)), tiny_teacher, 0)
    with pytest.raises(DataError, match=r"metadata\.jsonl, or a text file"):
        old_domain(Blend(prior=str(tmp_path / "none")), tiny_teacher, 0)


def test_samples_of_two_shapes_are_not_joined(tiny_teacher):
    data = tiny_latents(tiny_teacher)
    other = Latents(data.latents[..., :8], data.feeds, data.empty)
    with pytest.raises(DataError, match="encode both by one teacher"):
        joined(data, other)


def test_the_gap_is_the_distance_of_means_and_no_chance():
    draw = torch.Generator().manual_seed(0)
    real = torch.randn(400, 64, generator=draw)
    same, moved = (torch.randn(400, 64, generator=draw) + shift for shift in (0.0, 0.5))
    assert gap(same, real) < 0.35  # the spread of 400 means alone would be about 0.57
    assert gap(moved, real) == pytest.approx(0.5 * 8.0, abs=0.2)
    assert gap(real, real) == 0.0
    assert (way(2.0, 1.0, 0.5), way(2.0, 0.5, 0.5), way(1.0, 0.5, 1.5)) == (pytest.approx(2 / 3), 1.0, 0.0)


def judged(monkeypatch, found):
    monkeypatch.setattr(finetune_gate, "measure", lambda name, bundle, steps, *rest: found[steps])
    was = GateRow(model="s", steps=1, compliance=0.8, diversity=0.9, gap=2.0, gap_held_out=1.8)
    before = tuple(dataclasses.replace(was, steps=n) for n in found)
    teacher = GateRow(model="t", steps=10, compliance=0.9, diversity=1.0, gap=2.0, gap_held_out=1.8)
    tuned = dataclasses.replace(teacher, model="t, tuned", gap=0.5, gap_held_out=0.6)
    shown = Shown(("a",), torch.zeros(1, 64))
    return Judge(shown, shown, PromptSet((), torch.zeros(0, 64), 0), before, teacher, tuned)


def test_each_measure_decides_at_every_step_count_and_is_named(monkeypatch):
    good = GateRow(model="m", steps=4, compliance=0.79, diversity=0.72, gap=0.8, gap_held_out=0.9)
    plain = dataclasses.replace(good, gap_held_out=1.7)
    broken = dataclasses.replace(good, compliance=0.5)
    alike = dataclasses.replace(good, diversity=0.3)
    limits = Limits(diversity=0.5)
    for other, failed in ((good, ""), (plain, "style"), (broken, "compliance"), (alike, "diversity")):
        rows, passed = report_rows(judged(monkeypatch, {1: other, 4: good}), {"m": None}, limits)
        assert passed is not bool(failed) and len(rows) == 2 + 2 + 2
        assert list(rows[4].failures(limits)) == ([failed] if failed else []) and not rows[5].failures(limits)
        text = table(rows, limits)
        assert (f"FAILED: {failed}" in text) is bool(failed) and "passed" in text
    lost = dataclasses.replace(rows[5], varied=float("nan"))
    assert list(lost.failures(limits)) == ["diversity"]
    assert rows[4].failures(limits)["diversity"].startswith("33.3 %, and at least 50 %")
    assert "75 %" in text and "99 %" in text and "80 %" in text and "33 %" in text
    assert report_rows(judged(monkeypatch, {1: alike}), {"m": None}, Limits(diversity=0.3))[1]


def test_a_student_that_draws_every_seed_alike_has_no_diversity(tiny_lcm, short_prompts, monkeypatch):
    """It may well comply and have the style: the measure is of pictures of one prompt, against real scenes of it."""
    shown = Shown(("red circle", "blue circle"), torch.zeros(2, 64))
    asked = quality.draw_prompts(8)
    own = finetune_gate.measure("m", tiny_lcm, 1, shown, None, asked)
    draw = quality.sample_pictures
    monkeypatch.setattr(
        quality,
        "sample_pictures",
        lambda b, texts, seeds, *rest, **more: draw(b, texts, [0] * len(seeds), *rest, **more),
    )
    alike = finetune_gate.measure("m", tiny_lcm, 1, shown, None, asked)
    assert alike.diversity == 0.0 < own.diversity


def test_one_picture_has_no_gap(tmp_path):
    with pytest.raises(DataError, match="holds 1 picture, and a gap is measured on 2 or more"):
        finetune_gate.shown(pictures_in(tmp_path / "one", 1, 200), (32, 32))


def test_cut_outs_are_of_one_ground_and_say_nothing_of_it(tmp_path):
    folder = write_folder(tmp_path / "style", 4, 1)
    again = list(cut_outs(4, 1))
    for (path, text), (picture, said) in zip(read_metadata(folder), again, strict=True):
        pixels = np.asarray(Image.open(path))
        assert text == said and np.array_equal(pixels, np.asarray(picture))
        assert np.abs(pixels[0, 0].astype(int) - scenes.BACKGROUNDS["tan"]).max() <= 6
        assert not set(text.split()) & set(scenes.BACKGROUNDS)


def test_what_does_not_fit_is_refused_with_a_remedy(tiny_lcm, tiny_teacher, folders, tmp_path):
    odd = dataclasses.replace(tiny_lcm.spec, recipe="made elsewhere")
    stranger = with_networks(tiny_lcm, {"unet": load_denoiser(tiny_lcm)}, tmp_path / "stranger")
    stranger.spec = odd
    with pytest.raises(RecipeError, match=r"--set base=RECIPE"):
        settings_of(stranger, folders[0], {})
    for make, wrong in (
        (lambda: finetune_student(base="bk-sdm"), "makes none of few steps"),
        (lambda: finetune_student(steps=0), "steps is 0"),
        (lambda: finetune_student(others=1.5), "others is 1.5"),
        (lambda: Blend(count=0), "count is 0"),
    ):
        with pytest.raises(RecipeError, match=wrong):
            make()


def test_the_command_trains_and_says_whether_all_hold(tiny_lcm, tiny_teacher, folders, tmp_path, capsys, short_prompts):
    out, report = tmp_path / "mine", tmp_path / "gate.json"
    settings = {**FAST, "prior": str(folders[1])}
    words = [str(tiny_lcm.root), str(folders[0]), "--teacher", str(tiny_teacher.root), "--out", str(out)]
    for name, value in settings.items():
        words += ["--set", f"{name}={json.dumps(value)}"]
    words += [
        "--way",
        "distilled",
        "--steps",
        "1",
        "--device",
        "cpu",
        "--json",
        str(report),
        "--held-out",
        str(folders[1]),
    ]
    passed = command([*words, "--style=-1e9", "--kept=0", "--diversity=0"]) == 0
    found = json.loads(report.read_text())
    assert passed and found["passed"] and not found["drawn"] and found["target"] == str(folders[0])
    assert all(row["diversity"] > 0 for row in found["rows"]) and found["rows"][-1]["varied"] > 0
    said = capsys.readouterr()
    assert "| model | steps |" in said.out and "memory per process: " in said.err
    assert command([*words, "--style=-1e9", "--kept=0", "--diversity=1e9"]) == 1
    assert "the gate failed: mine in 1 steps, diversity: " in capsys.readouterr().err
