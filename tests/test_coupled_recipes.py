"""Couplings of noise and samples as recipes: refusals, a short run on the plane and on pictures, both of iCD."""

import dataclasses

import numpy as np
import pytest
import torch

from fewstep.models.bundle import load_bundle
from fewstep.models.paths import VP
from fewstep.runtime.engines.torch_engine import TorchEngine
from fewstep.runtime.sampling.loop import run_request
from fewstep.runtime.sampling.request import Edit, GenerateRequest
from fewstep.runtime.sampling.served import serve
from fewstep.runtime.sampling.text import Prompts
from fewstep.trainers.bench.recipes import Setup, on_plane
from fewstep.trainers.errors import RecipeError
from fewstep.trainers.networks.partners import encoder_of, picture_partner
from fewstep.trainers.objectives.invertible import LowerEdges, UpperEdges
from fewstep.trainers.objectives.variational import VariationalCoupling
from fewstep.trainers.parts.objective import Turn
from fewstep.trainers.plane.partners import plane_partner
from fewstep.trainers.plane.plane import CLASSES, conditions, plane
from fewstep.trainers.plane.run import PlaneBudget, run_recipe, sample_points
from fewstep.trainers.recipes.consistency import slct
from fewstep.trainers.recipes.coupled import COUPLED, icd, imagine_flash, vct
from fewstep.trainers.recipes.recipe import configure
from fewstep.trainers.recipes.registry import RECIPES
from fewstep.trainers.runs.distill import distill
from tiny import tiny_latents

TINY = Setup(budget=PlaneBudget(steps=4, start_steps=4, batch=16, pairs=32), points=8)
FAST = {"batch": 4, "steps": 2, "picture_every": 0, "checkpoint_every": 1, "bf16": False}
MORE = {
    "get": {"pairs": 5, "pair_steps": 2}, "icd": {"guidance_width": 32}, "imagine-flash": {"parts": 2}, "vct": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tiny_teacher):
    return tiny_latents(tiny_teacher)


@pytest.fixture(scope="module")
def students(tiny_teacher, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("coupled")
    return {
        name: distill(name, tiny_teacher, folder / name, FAST | MORE[name], data=data, device="cpu") for name in COUPLED
    }


@pytest.mark.parametrize("name", COUPLED)
def test_each_trains_and_samples_on_the_plane(name, start):
    trained = run_recipe(on_plane(name, TINY), plane(), start, TINY.budget)
    cond, uncond = conditions(torch.arange(CLASSES))
    for steps in trained.spec.grids:
        points = sample_points(trained, cond, uncond, steps, seed=0)
        assert points.shape == (CLASSES, 2) and bool(torch.isfinite(points).all())
    own = start.state_dict()
    assert any(not torch.equal(w, own[k]) for k, w in trained.net.state_dict().items() if k in own)


@pytest.mark.parametrize("name", COUPLED)
def test_each_makes_a_bundle_that_makes_pictures(name, students, tiny_teacher):
    bundle = students[name]
    assert bundle.spec.recipe == name and bundle.spec.teacher == tiny_teacher.name
    request = GenerateRequest(prompt="a red circle", seed=1, steps=bundle.spec.steps[-1])
    (picture,) = run_request(TorchEngine(bundle), bundle, request).pictures
    assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8


def test_the_inverse_is_sold_beside_and_takes_a_picture_to_its_noise(students):
    down = students["icd"]
    up = load_bundle(down.root.with_name(down.root.name + "-inverse"))
    assert up.spec.guidance.mode == "none" and up.spec.grids == {4: (749.0, 499.0, 249.0, 24.0)}
    assert not torch.equal(up.load("unet").conv_in.weight, down.load("unet").conv_in.weight)
    models = {b.name: serve(b, TorchEngine(b), Prompts(b, 4)) for b in (down, up)}
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    edit = Edit(image=picture, strength=1.0, prompt="a red circle")
    request = GenerateRequest(prompt="b", steps=4, invert=up.name, edit=edit, guidance=3.0, guidance_ramp=(0.3, 0.7))
    found = run_request(models[down.name].engine, down, request, prompts=models[down.name].prompts, models=models)
    plain = dataclasses.replace(request, invert=None, edit=None)
    other = run_request(models[down.name].engine, down, plain, prompts=models[down.name].prompts, models=models)
    assert found.pictures[0].shape == (32, 32, 3) and not np.array_equal(found.pictures[0], other.pictures[0])


def test_a_finished_stage_still_has_its_inverse(students, tiny_teacher, data, tmp_path):
    settings = FAST | MORE["icd"]
    first = distill("icd", tiny_teacher, tmp_path / "icd", settings, data=data, device="cpu")
    inverse = load_bundle(tmp_path / "icd-inverse")
    again = distill("icd", tiny_teacher, tmp_path / "icd", settings, data=data, device="cpu", resume=True)
    assert again.weights_digest == first.weights_digest == students["icd"].weights_digest
    assert load_bundle(tmp_path / "icd-inverse").weights_digest == inverse.weights_digest
    (tmp_path / "mine-inverse").mkdir()
    (tmp_path / "mine-inverse" / "thesis.txt").write_text("years")
    with pytest.raises(RecipeError, match=r"mine-inverse exists and holds no bundle\.json"):
        distill("icd", tiny_teacher, tmp_path / "mine", settings, data=data, device="cpu")


def test_edges_of_an_inverse_mirror_those_of_its_student():
    t = torch.tensor([24.0, 224.0, 249.0, 974.0], dtype=torch.float64)
    ends = UpperEdges(4)(VP(), t, t, Turn.of(0, 0, 1, "inverse"))
    assert ends.tolist() == [249.0, 249.0, 499.0, 999.0]
    assert LowerEdges(4, 50).of(VP()) == {4: (749.0, 499.0, 249.0, 19.0)}


def test_a_fresh_encoder_says_nothing(tiny_teacher, start):
    unet = encoder_of(tiny_teacher.load("unet"))
    out = unet(torch.randn(2, 4, 16, 16), torch.zeros(2), torch.randn(2, 24, 32), return_dict=False)[0]
    assert out.shape == (2, 8, 16, 16) and not out.any()
    encoder = plane_partner("encoder", start, path=VP(), seed=0)
    label = {"label": torch.eye(4)[:2]}
    assert encoder.denoiser().raw(torch.randn(2, 2), torch.zeros(2), label).shape == (2, 4)
    with pytest.raises(RecipeError, match="no network for a player 'judge'"):
        plane_partner("judge", start, path=VP(), seed=0)
    with pytest.raises(RecipeError, match="'vct' has a player 'judge'"):
        picture_partner("judge", "vct", tiny_teacher)


def test_settings_that_do_not_fit_are_refused_with_both_sides():
    with pytest.raises(RecipeError, match="4 phases do not divide the 50 points"):
        icd(points=50)
    with pytest.raises(RecipeError, match=r"shift is 0\.5 and parts 8"):
        imagine_flash(shift=0.5)
    with pytest.raises(RecipeError, match="kl is -1"):
        vct(kl=-1.0)
    with pytest.raises(RecipeError, match="pairs of KarrasPairs"):
        VariationalCoupling(base=slct().objective, kl=1.0)


def test_scales_of_icd_reach_down_to_none():
    recipe = configure(RECIPES["icd"], {"guidance_high": 8.0, "guidance_default": 5})
    assert recipe.sampling.guidance_range == (1.0, 8.0) and recipe.sampling.guidance_default == 5.0
    assert recipe.beside["inverse"].guidance_mode == "none" and recipe.sampling.phases == 4
