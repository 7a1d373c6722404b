"""The same folder, prompt, seed and steps give the picture of diffusers' own pipelines, within 1/255 per pixel."""

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    LatentConsistencyModelPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)

from fewstep.runtime.engines.torch_engine import TorchEngine
from fewstep.runtime.sampling.loop import run_request
from fewstep.runtime.sampling.request import Control, GenerateRequest

PROMPT = "a red cat, a big dog"
BOUND = 1 / 255


@pytest.fixture(scope="module")
def teacher(tiny_teacher):
    return tiny_teacher, TorchEngine(tiny_teacher)


@pytest.fixture(scope="module")
def lcm(tiny_lcm):
    return tiny_lcm, TorchEngine(tiny_lcm)


@pytest.fixture(scope="module")
def dmd2(tiny_dmd2):
    return tiny_dmd2, TorchEngine(tiny_dmd2)


@pytest.fixture(scope="module")
def pipelines(tiny_teacher, tiny_lcm, tiny_dmd2):
    opened = {
        "teacher": _quiet(StableDiffusionPipeline.from_pretrained(tiny_teacher.root)),
        "lcm": _quiet(LatentConsistencyModelPipeline.from_pretrained(tiny_lcm.root)),
        "dmd2": _quiet(StableDiffusionPipeline.from_pretrained(tiny_dmd2.root)),
    }
    net = ControlNetModel.from_pretrained(tiny_teacher.root / "controlnet")
    parts = {k: v for k, v in opened["teacher"].components.items() if k != "image_encoder"}
    opened["control"] = _quiet(StableDiffusionControlNetPipeline(**parts, controlnet=net))
    return opened


def _quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ours(served, **settings):
    bundle, engine = served
    return run_request(engine, bundle, GenerateRequest(prompt=PROMPT, **settings)).pictures[0]


def theirs(pipeline, seed, **settings):
    generator = torch.Generator("cpu").manual_seed(seed)
    return pipeline(PROMPT, generator=generator, output_type="np", height=32, width=32, **settings).images[0]


def assert_same(picture, reference):
    assert picture.dtype == np.uint8
    assert np.std(reference) > 0.01, "the reference is a flat picture: nothing is compared"
    assert np.abs(picture / 255 - reference).max() <= BOUND


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_lcm(lcm, pipelines, steps, guidance):
    picture = ours(lcm, steps=steps, seed=7, guidance=guidance)
    assert_same(picture, theirs(pipelines["lcm"], 7, num_inference_steps=steps, guidance_scale=guidance))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 25])
def test_ddim_under_guidance(teacher, pipelines, steps):
    picture = ours(teacher, steps=steps, seed=11, guidance=4.0)
    assert_same(picture, theirs(pipelines["teacher"], 11, num_inference_steps=steps, guidance_scale=4.0))


def test_ddim_without_guidance_and_with_a_negative_prompt(teacher, pipelines):
    plain = theirs(pipelines["teacher"], 3, num_inference_steps=4, guidance_scale=1.0)
    assert_same(ours(teacher, steps=4, seed=3, guidance=1.0), plain)
    negative = theirs(pipelines["teacher"], 3, num_inference_steps=4, guidance_scale=5.0, negative_prompt="blue")
    assert_same(ours(teacher, steps=4, seed=3, guidance=5.0, negative_prompt="blue"), negative)
    assert np.abs(negative - plain).max() > 4 * BOUND


@pytest.mark.parametrize("steps", [1, 4])
def test_student_without_guidance(dmd2, pipelines, steps):
    picture = ours(dmd2, steps=steps, seed=5)
    assert_same(picture, theirs(pipelines["dmd2"], 5, num_inference_steps=steps, guidance_scale=1.0))


@pytest.mark.parametrize(
    ("scale", "start", "end", "guidance"), [(1.0, 0.0, 1.0, 4.0), (0.6, 0.0, 0.5, 4.0), (1.3, 0.25, 1.0, 1.0)]
)
def test_controlnet(teacher, pipelines, scale, start, end, guidance):
    edge = np.zeros((32, 32, 3), np.uint8)
    edge[8:24, 8:10], edge[8:10, 8:24] = 255, 200
    control = Control(edge=edge, scale=scale, start=start, end=end)
    settings = {"num_inference_steps": 4, "guidance_scale": guidance}
    reference = theirs(
        pipelines["control"],
        9,
        image=torch.from_numpy(edge / 255.0).permute(2, 0, 1)[None].float(),
        controlnet_conditioning_scale=scale,
        control_guidance_start=start,
        control_guidance_end=end,
        **settings,
    )
    assert_same(ours(teacher, steps=4, seed=9, guidance=guidance, control=control), reference)
    plain = ours(teacher, steps=4, seed=9, guidance=guidance)
    assert np.abs(plain / 255 - reference).max() > 4 * BOUND, "the ControlNet made no difference"


@pytest.mark.parametrize("which", ["lcm", "teacher"])
def test_pixels_are_rounded_as_diffusers_rounds_them(request, pipelines, which):
    """Its own 8-bit pictures; a value that lies on the edge of rounding may fall either way."""
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0}
    generator = torch.Generator("cpu").manual_seed(4)
    image = pipelines[which](PROMPT, generator=generator, output_type="pil", height=32, width=32, **settings).images[0]
    picture = ours(request.getfixturevalue(which), steps=2, seed=4, guidance=3.0)
    off = np.abs(picture.astype(int) - np.array(image))
    assert off.max() <= 1
    assert (off > 0).mean() < 0.01


def test_several_pictures_have_the_seeds_that_follow(lcm, pipelines):
    bundle, engine = lcm
    result = run_request(engine, bundle, GenerateRequest(prompt=PROMPT, steps=2, seed=20, n=2))
    assert result.seeds == (20, 21)
    for seed, picture in zip(result.seeds, result.pictures, strict=True):
        assert_same(picture, theirs(pipelines["lcm"], seed, num_inference_steps=2, guidance_scale=result.guidance))
