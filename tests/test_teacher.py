"""The teacher's stages, tiny: every stage runs, the result is a bundle that diffusers loads, and a cut run resumes."""

import dataclasses
import random

import pytest
import torch
from diffusers import StableDiffusionPipeline

from fewstep.trainers.errors import CheckpointError
from fewstep.trainers.pictures import scenes
from fewstep.trainers.runs import teacher
from fewstep.trainers.runs.teacher_parts import CLAIM_SIZES, claim_numbers

TINY = teacher.TeacherSettings(
    autoencoder_steps=2, words_steps=2, denoiser_steps=2, control_steps=2, pictures=16, scenes=16, control_scenes=8,
    batch=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher") / "scenes"
    return teacher.train_teacher(out, TINY, device="cpu")


def test_bundle_loads_in_diffusers_with_its_own_scheduler(trained):
    pipe = StableDiffusionPipeline.from_pretrained(trained.root, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a red circle", num_inference_steps=2, output_type="np").images[0]
    assert picture.shape == (64, 64, 3)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.vae.config.scaling_factor == trained.spec.latent.scale


def test_has_a_controlnet_and_unit_latents(trained):
    assert trained.has("controlnet")
    rng = random.Random(3)
    pixels = torch.stack([teacher_pixels(scenes.sample(rng)) for _ in range(8)])
    with torch.no_grad():
        latent = trained.encoder()(pixels)
    assert latent.shape == (8, 8, 8, 8)
    assert 0.5 < latent.square().mean().sqrt().item() < 2.0


def teacher_pixels(sample):
    from fewstep.trainers.pictures.data import to_pixels

    return to_pixels(scenes.render(sample.scene))


def test_there_must_be_a_run_to_resume(tmp_path):
    with pytest.raises(CheckpointError, match=r"cut\.run holds no run; leave out --resume"):
        teacher.train_teacher(tmp_path / "cut", TINY, resume=True, device="cpu")
    assert not list(tmp_path.iterdir())


def test_resume_takes_up_the_stage_that_was_cut(tmp_path, trained):
    straight = dataclasses.replace(TINY, control_steps=4)
    whole = teacher.train_teacher(tmp_path / "whole", straight, device="cpu")
    teacher.train_teacher(tmp_path / "cut", TINY, device="cpu")
    import shutil

    shutil.rmtree(tmp_path / "cut.run" / "bundle" / "controlnet")
    resumed = teacher.train_teacher(tmp_path / "cut", straight, resume=True, device="cpu")
    files = sorted(p.relative_to(whole.root) for p in whole.root.rglob("*.safetensors"))
    assert files == sorted(p.relative_to(resumed.root) for p in resumed.root.rglob("*.safetensors"))
    for name in ("unet", "text_encoder", "vae"):
        a, b = whole.load(name).state_dict(), resumed.load(name).state_dict()
        assert all(torch.equal(a[k], b[k]) for k in a), name


def test_claim_numbers_fit_their_classes():
    rng = random.Random(0)
    rows = [claim_numbers(scenes.sample(rng).caption) for _ in range(500)]
    assert all(0 <= value < size for row in rows for value, size in zip(row, CLAIM_SIZES, strict=True))
    reached = [max(row[k] for row in rows) for k in range(len(CLAIM_SIZES))]
    assert reached == [size - 1 for size in CLAIM_SIZES]
