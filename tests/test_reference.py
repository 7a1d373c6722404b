"""The shipped bundles: they load here and in diffusers, draw what the prompt says, and keep their published quality."""

import json
import random

import numpy as np
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, StableDiffusionPipeline

from fewstep.models.bundle import REFERENCE, load_bundle
from fewstep.trainers.pictures import compliance, scenes
from fewstep.trainers.pictures.quality import draw_prompts, sample_pictures

NAMES = ("scenes-teacher", "scenes-lcm", "scenes-dmd2", "scenes-progressive")
STEPS = {"scenes-teacher": 25, "scenes-lcm": 4, "scenes-dmd2": 1, "scenes-progressive": 4}
MEASURED = {"scenes-teacher": {4, 25}, "scenes-lcm": {1, 2, 4}, "scenes-dmd2": {1, 2, 4}, "scenes-progressive": {4}}


def test_all_weights_fit_in_40_mb():
    size = sum(p.stat().st_size for p in REFERENCE.rglob("*.safetensors"))
    assert 10e6 < size <= 40e6


@pytest.mark.parametrize("name", NAMES)
def test_loads_by_its_short_name_with_quality_and_golden_cases(name):
    bundle = load_bundle(name)
    assert bundle.name == name
    assert {row.steps for row in bundle.spec.quality} >= MEASURED[name]
    assert bundle.spec.golden
    assert json.loads((bundle.root / "model_index.json").read_text())["scheduler"][0] == "diffusers"


@pytest.mark.parametrize("name", NAMES)
def test_quality_is_what_the_bundle_says(name):
    """A fresh sample of prompts reaches the published compliance, less three standard errors."""
    bundle = load_bundle(name)
    steps = STEPS[name]
    row = next(r for r in bundle.spec.quality if r.steps == steps)
    prompts = draw_prompts(48, seed=11)
    pictures = sample_pictures(bundle, [c.text for c in prompts.captions], list(range(48)), steps)
    scores = [compliance.check(p, c).score for p, c in zip(pictures, prompts.captions, strict=True)]
    error = np.std(scores) / len(scores) ** 0.5
    assert np.mean(scores) > row.compliance - 3 * error - 0.01


def test_students_keep_the_teachers_words():
    best = {name: {r.steps: r.compliance for r in load_bundle(name).spec.quality} for name in NAMES}
    teacher = best["scenes-teacher"][25]
    assert teacher >= 0.88
    assert best["scenes-lcm"][4] >= 0.9 * teacher
    assert best["scenes-dmd2"][1] >= 0.95 * teacher
    distance = {r.steps: r.frechet for r in load_bundle("scenes-dmd2").spec.quality}
    assert distance[1] <= 1.2 * {r.steps: r.frechet for r in load_bundle("scenes-teacher").spec.quality}[25]


def test_diffusers_loads_and_runs_the_folders():
    lcm = LatentConsistencyModelPipeline.from_pretrained(REFERENCE / "scenes-lcm")
    teacher = StableDiffusionPipeline.from_pretrained(REFERENCE / "scenes-teacher")
    for pipe, steps, scale in ((lcm, 4, 3.0), (teacher, 25, 3.0)):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator("cpu").manual_seed(3)
        picture = pipe(
            "a large red circle on a gray background", num_inference_steps=steps, guidance_scale=scale,
            generator=generator, output_type="np",
        ).images[0]  # fmt: skip
        said = (scenes.ObjectClaim("circle", "red", "large"),)
        verdict = compliance.check(
            (picture * 255).round().astype(np.uint8),
            scenes.Caption("a large red circle on a gray background", said, None, "gray"),
        )
        assert verdict.score >= 0.8, verdict


def test_the_controlnet_follows_edges():
    """With the edges of a scene and its caption, the drawn objects stand where the edges are."""
    from fewstep.runtime.sampling.request import Control, GenerateRequest
    from fewstep.runtime.service.local import Runtime

    rng = random.Random(5)
    near = []
    with Runtime(["scenes-teacher"], engine="torch") as runtime:
        for k in range(8):
            sample = scenes.sample(rng)
            edge = np.asarray(scenes.edges(sample.scene))
            request = GenerateRequest(prompt=sample.caption.text, seed=k, steps=10, control=Control(edge=edge))
            seen = compliance.read(runtime.generate(request).pictures[0])
            for thing in sample.scene.objects:
                gaps = [np.hypot(o.x - thing.x, o.y - thing.y) for o in seen.objects]
                near.append(min(gaps, default=99.0) < 4.0)
    assert np.mean(near) >= 0.8
