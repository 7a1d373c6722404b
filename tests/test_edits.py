"""Pictures to begin from: beside diffusers' own pipelines, to the pixel where they are kept, and refused where not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    LatentConsistencyModelImg2ImgPipeline,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from PIL import Image

from beside_diffusers import BOUND, PROMPT, quiet
from fewstep.models.bundle import load_bundle, reseal
from fewstep.runtime.engines.fake_engine import FakeEngine, fake_bundle, fake_spec
from fewstep.runtime.engines.torch_engine import TorchEngine
from fewstep.runtime.sampling.edits import LUMINANCE, keep_coarse, keep_grey, latent_mask, picture_tensor, put_back
from fewstep.runtime.sampling.loop import run_request
from fewstep.runtime.sampling.plan import compile_plan
from fewstep.runtime.sampling.request import Edit, GenerateRequest, resolve
from tiny import copy_bundle

rng = np.random.default_rng(0)
COARSE = rng.integers(0, 256, (8, 8, 3), np.uint8)
PICTURE = np.asarray(Image.fromarray(COARSE).resize((32, 32), Image.Resampling.BILINEAR))
MASK = np.zeros((32, 32), np.uint8)
MASK[8:24, 8:20] = 255


def made(bundle, engine, **settings):
    return run_request(engine, bundle, GenerateRequest(prompt=PROMPT, seed=5, **settings)).pictures[0]


def theirs(pipeline, **settings):
    """(latent, picture in [0, 1]) of diffusers' pipeline, decoded as it decodes."""
    draw = torch.Generator().manual_seed(5)
    image = Image.fromarray(PICTURE)
    latent = quiet(pipeline)(
        PROMPT, image=image, generator=draw, output_type="latent", guidance_scale=3.0, **settings
    ).images
    with torch.no_grad():
        decoded = pipeline.vae.decode(latent / pipeline.vae.config.scaling_factor, return_dict=False)[0]
    return latent[0], pipeline.image_processor.postprocess(decoded, output_type="np")[0]


def assert_same(bundle, engine, reference, **settings):
    """Ours is diffusers' latent and picture; without the picture to begin from it is another. Returns ours."""
    seen = {}
    request = GenerateRequest(prompt=PROMPT, seed=5, guidance=3.0, **settings)
    for asked in (request, replace(request, edit=None)):
        found = run_request(engine, bundle, asked, watch=lambda _, k, x, a=asked: seen.__setitem__(a.edit is None, x))
        if asked.edit is not None:
            picture = found.pictures[0]
    latent, wanted = reference
    assert (seen[False] - latent).abs().max() < 1e-3 < 0.1 < (seen[True] - latent).abs().max()
    if settings["edit"].mask is None:
        assert np.abs(picture / 255 - wanted).max() <= BOUND
    return picture


@pytest.fixture(scope="module")
def teacher(tiny_teacher):
    return tiny_teacher, TorchEngine(tiny_teacher)


@pytest.fixture(scope="module")
def lcm(tiny_lcm, tmp_path_factory):
    bundle = load_bundle(copy_bundle(tiny_lcm, tmp_path_factory.mktemp("origin") / "lcm"))
    bundle = reseal(bundle, origin_steps=50)
    return bundle, TorchEngine(bundle)


# --- img2img beside diffusers


@pytest.mark.parametrize(("steps", "strength"), [(4, 0.75), (5, 0.5), (8, 0.3), (3, 0.99)])
def test_ddim_students_and_teachers_make_diffusers_picture(teacher, steps, strength):
    bundle, engine = teacher
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(bundle.root)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    wanted = theirs(pipeline, strength=strength, num_inference_steps=steps)
    assert_same(bundle, engine, wanted, steps=steps, edit=Edit(image=PICTURE, strength=strength))


@pytest.mark.parametrize(("steps", "strength"), [(4, 0.5), (4, 0.75), (2, 0.3), (1, 0.5)])
def test_lcm_students_make_diffusers_picture(lcm, steps, strength):
    bundle, engine = lcm
    parts = StableDiffusionImg2ImgPipeline.from_pretrained(bundle.root).components
    del parts["image_encoder"]
    pipeline = LatentConsistencyModelImg2ImgPipeline(**parts, requires_safety_checker=False)
    wanted = theirs(pipeline, strength=strength, num_inference_steps=steps)
    assert_same(bundle, engine, wanted, steps=steps, edit=Edit(image=PICTURE, strength=strength))


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_every_grid_of_a_strength_is_the_lcm_schedulers(steps):
    spec = fake_spec(origin_steps=50)
    for strength in np.arange(0.02, 1.0, 0.02).tolist():
        edit = Edit(image=np.zeros((64, 64, 3), np.uint8), strength=strength)
        request = resolve(GenerateRequest(prompt="a", steps=steps, edit=edit), spec)
        times = [row.t for row in compile_plan(request, spec).rows]
        if int(50 * strength) < steps:
            assert len(times) == int(50 * strength), "fewer, where diffusers refuses, but never none"
            continue
        scheduler = LCMScheduler(original_inference_steps=50)
        scheduler.set_timesteps(steps, strength=strength)
        assert times == scheduler.timesteps.tolist(), strength


# --- inpainting


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_makes_diffusers_picture_and_keeps_the_rest_to_the_pixel(teacher, strength):
    bundle, engine = teacher
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(bundle.root)
    mask, settings = Image.fromarray(MASK), {"num_inference_steps": 5, "height": 32, "width": 32}
    wanted = theirs(pipeline, mask_image=mask, strength=strength, **settings)
    found = assert_same(bundle, engine, wanted, steps=5, edit=Edit(image=PICTURE, mask=MASK, strength=strength))
    inside = MASK == 255
    assert np.array_equal(found[~inside], PICTURE[~inside])
    assert np.abs(found / 255 - wanted[1])[inside].max() <= BOUND
    assert np.abs(found[inside].astype(int) - PICTURE[inside]).max() > 8


@pytest.mark.parametrize("which", ["lcm", "teacher"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_any_mask_keeps_its_pixels(request, which, steps):
    bundle, engine = request.getfixturevalue(which)
    mask = np.where(rng.random((32, 32)) < 0.3, 255, 0).astype(np.uint8)
    mask[3, :] = 128
    found = made(bundle, engine, steps=steps, edit=Edit(image=PICTURE, mask=mask, strength=0.9))
    assert np.array_equal(found[mask == 0], PICTURE[mask == 0])
    assert not np.array_equal(found[mask == 255], PICTURE[mask == 255])


def test_a_latent_pixel_is_as_new_as_its_newest_pixel():
    mask = np.zeros((16, 16), np.uint8)
    mask[3, 9] = 255
    small = latent_mask(mask, 8)
    assert small.tolist() == [[[0.0, 1.0], [0.0, 0.0]]]


# --- colourisation and super-resolution


def grey(picture):
    return picture.astype(float) @ np.asarray(LUMINANCE) / sum(LUMINANCE)


def blocks(picture):
    return picture.astype(float).reshape(4, 8, 4, 8, 3).mean(axis=(1, 3))


def test_what_is_kept_is_kept_in_an_orthogonal_basis():
    """Nothing else moves: the change has no part along what is free (consistency models, Song et al. 2023)."""
    draw = torch.Generator().manual_seed(0)
    made_up, source = torch.randn(2, 3, 16, 16, generator=draw), torch.randn(2, 3, 16, 16, generator=draw)
    axis = torch.tensor(LUMINANCE)[:, None, None]
    out = keep_grey(made_up, source)
    assert torch.allclose((out * axis).sum(1), (source * axis).sum(1), atol=1e-5)
    assert torch.linalg.cross(out - made_up, axis.expand_as(out), dim=1).abs().max() < 1e-5
    out = keep_coarse(made_up, source)
    means = torch.nn.functional.avg_pool2d(out, 8)
    assert torch.allclose(means, torch.nn.functional.avg_pool2d(source, 8), atol=1e-5)
    moved = out - made_up
    assert torch.allclose(moved, moved[..., ::8, ::8].repeat_interleave(8, 2).repeat_interleave(8, 3))


@pytest.mark.parametrize("which", ["lcm", "teacher"])
def test_a_colourised_picture_has_the_luminance_and_a_sharpened_one_the_means(request, which):
    bundle, engine = request.getfixturevalue(which)
    soft = (PICTURE // 2 + 64).astype(np.uint8)
    plain = made(bundle, engine, steps=2, edit=Edit(image=soft, strength=1.0))
    coloured = made(bundle, engine, steps=2, edit=Edit(image=soft, strength=1.0, keep="grey"))
    assert np.abs(grey(coloured) - grey(soft)).max() <= 1.0 < np.abs(grey(plain) - grey(soft)).max()
    sharp = made(bundle, engine, steps=2, edit=Edit(image=soft, strength=1.0, keep="coarse"))
    assert np.abs(blocks(sharp) - blocks(soft)).max() <= 1.0 < np.abs(blocks(plain) - blocks(soft)).max()
    assert not np.array_equal(sharp, soft) and not np.array_equal(coloured, soft)


def test_the_hook_acts_at_every_step_not_only_at_the_end(lcm):
    bundle, engine = lcm
    seen = {}
    for keep in (None, "grey"):
        request = GenerateRequest(prompt=PROMPT, seed=5, steps=2, edit=Edit(image=PICTURE, strength=1.0, keep=keep))
        run_request(engine, bundle, request, watch=lambda p, k, x, keep=keep: seen.__setitem__((keep, k), x))
    assert torch.equal(seen[None, 0], seen["grey", 0]) and not torch.allclose(seen[None, 1], seen["grey", 1])


def test_colours_that_leave_the_range_become_greyer_not_brighter():
    picture = np.full((32, 32, 3), 250, np.uint8)
    wild = np.zeros((32, 32, 3), np.uint8)
    wild[..., 0] = 255
    found = put_back(wild, Edit(image=picture, keep="grey"))
    assert np.abs(grey(found) - 250).max() <= 1.0 and (found[..., 0] == 255).all()


# --- what every edit is


def test_the_weaker_the_edit_the_nearer_to_the_picture():
    """With a fake whose decoder is the encoder's inverse on flat colours, from far to the round trip itself."""
    spec = replace(fake_spec(), sampler="ddim", stochastic=False, boundary=None, prediction="eps")
    engine, bundle = FakeEngine(spec), fake_bundle(spec=spec)
    picture = np.full((64, 64, 3), 140, np.uint8)
    whole = engine.run("decoder", {"latent": engine.run("encoder", {"picture": picture_tensor(picture)[None]})[0]})
    trip = (whole[0][0].permute(1, 2, 0).numpy() * 127.5 + 127.5).round()
    errors = []
    for t in (999.0, 500.0, 200.0, 20.0):
        request = GenerateRequest(prompt="a", times=(t,), edit=Edit(image=picture, strength=0.999))
        errors.append(np.abs(run_request(engine, bundle, request).pictures[0] - trip).mean())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.3 * errors[0]


def test_pictures_of_one_request_begin_from_noise_of_their_own(lcm):
    bundle, engine = lcm
    request = GenerateRequest(prompt=PROMPT, seed=5, steps=2, n=2, edit=Edit(image=PICTURE, strength=0.5))
    one, two = run_request(engine, bundle, request).pictures
    alone = run_request(engine, bundle, replace(request, seed=6, n=1)).pictures[0]
    assert np.array_equal(two, alone) and not np.array_equal(one, two)
