"""A small decoder distilled from a bundle's own, and the table that says what it costs and loses."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from fewstep.models.bundle import load_bundle
from fewstep.trainers.bench import dial
from fewstep.trainers.errors import RecipeError
from fewstep.trainers.runs.tiny_decoder import (
    COMPONENT,
    TinyDecoderSettings,
    build_tiny,
    distill_decoder,
    training_latents,
    with_tiny_decoder,
)
from fewstep.trainers.runs.tiny_decoder import command as distil_command
from tiny import copy_bundle, tiny_latents

FAST = TinyDecoderSettings(blocks=(1, 0), steps=30, batch=4, pictures=4, bf16=False)


@pytest.fixture(scope="module")
def latents(tiny_lcm, tmp_path_factory):
    from fewstep.trainers.pictures.data import save_latents

    file = tmp_path_factory.mktemp("latents") / "latents.safetensors"
    data = tiny_latents(tiny_lcm)
    save_latents(file, data)
    return data, file


@pytest.fixture(scope="module")
def distilled(tiny_lcm, latents, tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny-decoder") / "lcm"
    return distill_decoder(tiny_lcm, out, replace(FAST, latents=str(latents[1])), device="cpu")


def vae(blocks):
    torch.manual_seed(0)
    return AutoencoderTiny(
        latent_channels=4, encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1), num_decoder_blocks=blocks, scaling_factor=1.3,
    ).eval()  # fmt: skip


def test_of_the_same_width_it_inherits():
    larger, latent = vae((2, 2, 1)), torch.randn(2, 4, 4, 4)
    same = build_tiny(larger, None, (2, 2, 1)).eval()
    assert torch.equal(same.decode(latent).sample, larger.decode(latent).sample)
    fewer = build_tiny(larger, 8, (2, 1, 0))
    old = [layer for layer in larger.decoder.layers if any(True for _ in layer.parameters())]
    new = [layer for layer in fewer.decoder.layers if any(True for _ in layer.parameters())]
    # conv, 2 blocks, conv, 2 blocks (1 stays), conv, block (goes), conv
    for mine, theirs in zip(new, [old[k] for k in (0, 1, 2, 3, 4, 6, 8)], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
    assert fewer.config.scaling_factor == 1.3 and fewer.config.num_decoder_blocks == (2, 1, 0)


def test_a_narrower_one_keeps_the_encoder():
    larger = vae((1, 1, 1))
    narrow = build_tiny(larger, 4, (1, 1, 0))
    picture = torch.rand(1, 3, 16, 16)
    assert torch.equal(narrow.encode(picture).latents, larger.encode(picture).latents)
    assert sum(p.numel() for p in narrow.decoder.parameters()) < sum(p.numel() for p in larger.decoder.parameters()) / 3
    with pytest.raises(RecipeError, match="has 3 resolutions, so give 3 numbers"):
        build_tiny(larger, None, (1, 1))
    with pytest.raises(RecipeError, match="is an Linear"):
        build_tiny(torch.nn.Linear(1, 1), None, (1,))


def test_it_learns_what_the_larger_one_draws(distilled, tiny_lcm):
    again = load_bundle(distilled.root)
    assert again.spec == tiny_lcm.spec and again.has(COMPONENT)
    assert type(again.load(COMPONENT)) is AutoencoderTiny
    run = distilled.root.with_name("lcm.run")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, last = (np.mean([row["error"] for row in part]) for part in (rows[:5], rows[-5:]))
    assert len(rows) == 30 and last < 0.5 * first
    assert {path.name for path in (run / "samples").iterdir()} == {"larger.png", "tiny.png"}


def test_it_learns_on_data_and_on_the_students_own_samples(tiny_lcm, tiny_teacher, latents):
    for bundle in (tiny_lcm, tiny_teacher):
        found = training_latents(bundle, latents[0], 4, 0)
        assert found.shape == (8, 4, 16, 16) and found.isfinite().all()
        assert sorted(found[:4].sum((1, 2, 3)).tolist()) == sorted(latents[0].latents.half().sum((1, 2, 3)).tolist())


def test_a_bundle_can_be_drawn_with_it(distilled, tiny_lcm, tmp_path):
    drawn = with_tiny_decoder(distilled, tmp_path / "drawn")
    x = torch.randn(1, 4, 16, 16)
    tiny = distilled.load(COMPONENT)
    with torch.no_grad():
        assert torch.equal(drawn.decoder()(x), tiny.decode(x / 1.3).sample)
    with pytest.raises(RecipeError, match="has no tiny_decoder/"):
        with_tiny_decoder(tiny_lcm, tmp_path / "none")


def test_settings_that_are_not_there_are_refused(tiny_lcm, tmp_path):
    with pytest.raises(RecipeError, match="has no setting 'widht'; it has batch, "):
        distil_command(["--teacher", str(tiny_lcm.root), "--out", str(tmp_path / "a"), "--set", "widht=3"])


def test_the_dial_measures_students_and_decoders(distilled, tiny_lcm, tmp_path, monkeypatch, capsys):
    """Figures of pictures are those of `bench quality`, tested there; here they are given."""
    asked = []

    def measured(bundle, steps, prompt_set, *, progress):
        asked.append((bundle.name, steps))
        loss = 0.02 * steps if bundle.name.endswith("+tiny") else 0.0
        row = _row(steps, frechet=4.0, compliance=0.8 - loss)
        return dial.Measured(row, 0.5, 1.0)

    monkeypatch.setattr(dial, "measure_bundle", measured)
    monkeypatch.setattr(dial, "draw_prompts", lambda prompts, seed: None)
    monkeypatch.setattr(dial, "COMPLIANCE_BUDGET", 0.03)
    plain = copy_bundle(tiny_lcm, tmp_path / "plain")
    call = [str(plain), str(distilled.root), "--steps", "1,2", "--prompts", "8", "--quiet"]
    note = tmp_path / "note.md"
    note.write_text("How they were trained.\n")
    out = ["--out", str(tmp_path / "page.md"), "--note", str(note)]
    assert dial.command([*call, *out]) == 0
    report, page = json.loads((tmp_path / "page.json").read_text()), (tmp_path / "page.md").read_text()
    whole, same, tiny = report["rows"]
    assert [row["model"] for row in report["rows"]] == ["tiny-lcm", "tiny-lcm", "tiny-lcm+tiny"]
    assert whole["denoiser"]["operations"] == tiny["denoiser"]["operations"] == same["denoiser"]["operations"] > 0
    assert tiny["decoder"]["operations"] < whole["decoder"]["operations"]
    assert tiny["decoder"]["weights"] == sum(p.numel() for p in distilled.load(COMPONENT).decoder.parameters())
    assert all(row[role]["seconds"] > 0 for row in report["rows"] for role in ("denoiser", "decoder"))
    assert tiny["verdict"] == {"1": True, "2": False}
    assert "tiny-lcm+tiny at 1 step: the tiny decoder keeps within" in page
    assert "at 2 steps: the tiny decoder exceeds" in page and page.endswith("How they were trained.\n")
    assert dial.table(report) in capsys.readouterr().out
    before = len(asked)
    assert dial.command([*call, *out]) == 0
    assert len(asked) == before, "figures of the same weights and prompts are not measured again"
    assert dial.command([*call[:-3], "--prompts", "9", "--quiet", *out]) == 0
    assert len(asked) > before


def _row(steps, **figures):
    from fewstep.models.spec import QualityRow

    return QualityRow(steps=steps, nfe=steps, guidance=3.0, diversity=1.0, pictures=8, **figures)
