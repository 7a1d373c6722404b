"""Recipes that adapt what is there: LCSC's checkpoints are saved, combined and survive a cut run."""

import json
from dataclasses import replace

import pytest
import torch

from fewstep.runtime.engines.torch_engine import TorchEngine
from fewstep.runtime.sampling.loop import run_request
from fewstep.runtime.sampling.request import GenerateRequest
from fewstep.runtime.sampling.served import serve
from fewstep.runtime.sampling.text import Prompts
from fewstep.trainers.errors import RecipeError
from fewstep.trainers.loop.checkpoint_search import Kept, KeptFiles, Search, settle
from fewstep.trainers.plane.plane import CLASSES, conditions, plane
from fewstep.trainers.plane.run import PlaneBudget, run_recipe, sample_points
from fewstep.trainers.recipes.adapted import ADAPTED, lcsc, speedupnet
from fewstep.trainers.recipes.recipe import configure
from fewstep.trainers.recipes.registry import RECIPES
from fewstep.trainers.runs.distill import distill
from tiny import tiny_latents

BUDGET = PlaneBudget(steps=8, start_steps=4, batch=16, pairs=32)
FAST = {"batch": 4, "steps": 4, "picture_every": 0, "checkpoint_every": 1, "bf16": False}
MORE = {"lcsc": {"saved": 2, "rounds": 2, "samples": 4, "score_steps": [1]}, "speedupnet": {"parts": 1}}


@pytest.fixture(scope="module")
def data(tiny_teacher):
    return tiny_latents(tiny_teacher)


@pytest.fixture(scope="module")
def students(tiny_teacher, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapted")
    return {
        name: distill(name, tiny_teacher, folder / name, FAST | MORE[name], data=data, device="cpu") for name in ADAPTED
    }


@pytest.mark.parametrize("name", ADAPTED)
def test_each_trains_and_samples_on_the_plane(name, start):
    recipe = configure(RECIPES[name], {**MORE[name], "guidance": 1.0})
    trained = run_recipe(recipe, plane(), start, BUDGET)
    cond, uncond = conditions(torch.arange(CLASSES))
    for steps in trained.spec.grids:
        points = sample_points(trained, cond, uncond, steps, seed=0)
        assert points.shape == (CLASSES, 2) and bool(torch.isfinite(points).all())


@pytest.mark.parametrize("name", ADAPTED)
def test_each_makes_a_bundle_that_makes_pictures(name, students):
    bundle = students[name]
    (picture,) = run_request(TorchEngine(bundle), bundle, GenerateRequest(prompt="b", seed=1, steps=4)).pictures
    assert bundle.spec.recipe == name and picture.shape == (32, 32, 3)


def test_adapters_alone_were_trained_and_hear_a_negative_prompt(students, tiny_teacher):
    bundle = students["speedupnet"]
    mine, theirs = bundle.load("unet").state_dict(), tiny_teacher.load("unet").half().float().state_dict()
    assert all(torch.equal(mine[name], weight) for name, weight in theirs.items())
    shifts = [value for name, value in mine.items() if name.endswith(".shift")]
    assert shifts and any(bool(shift.any()) for shift in shifts)
    model = serve(bundle, TorchEngine(bundle), Prompts(bundle, 4))
    plain = GenerateRequest(prompt="b", seed=1, steps=4)
    away = replace(plain, negative_prompt="a red circle", negative_mode="sun")
    made = [
        run_request(model.engine, bundle, request, prompts=model.prompts, models={bundle.name: model}).pictures[0]
        for request in (plain, away, replace(away, negative_scale=2.0))
    ]
    assert model.negative == "sun" and not (made[0] == made[1]).all() and not (made[1] == made[2]).all()


def test_checkpoints_are_saved_and_the_best_combination_is_kept(students):
    run = students["lcsc"].root.with_name("lcsc.run") / "lcsc"
    assert sorted(file.name for file in (run / "saved").iterdir()) == ["0000.safetensors", "0001.safetensors"]
    report = json.loads((run / "search.json").read_text())
    assert len(report["coefficients"]) == 3 and sum(report["coefficients"]) == pytest.approx(1.0)
    assert report["distance"] <= report["last"]


def test_a_run_cut_before_its_search_ends_as_the_whole_one(students, tiny_teacher, data, tmp_path):
    out, settings = tmp_path / "cut", FAST | MORE["lcsc"]
    distill("lcsc", tiny_teacher, out, settings, data=data, device="cpu")
    for name in ("student.safetensors", "search.json"):
        (tmp_path / "cut.run" / "lcsc" / name).unlink()
    again = distill("lcsc", tiny_teacher, out, settings, data=data, device="cpu", resume=True)
    assert again.weights_digest == students["lcsc"].weights_digest


def test_a_shelf_gives_back_what_it_was_given(tmp_path):
    for shelf in (Kept(), KeptFiles(tmp_path / "saved")):
        for place in (3, 1):
            assert not shelf.has(place)
            shelf.put(place, {"w": torch.full((2, 3), float(place)).t()})
        assert shelf.has(3) and [float(each["w"][0, 0]) for each in shelf.all()] == [1.0, 3.0]


def test_the_best_is_left_in_the_network():
    net = torch.nn.Linear(1, 1, bias=False)
    saved = [{"weight": torch.tensor([[value]])} for value in (0.0, 1.0, 2.0)]
    found = settle(Search(rounds=200), saved, net, lambda n: abs(n.weight.item() - 2.7), 0)
    assert net.weight.item() == pytest.approx(2.7, abs=0.1) and found.score < 0.1 < found.plain


def test_stages_that_cannot_be_are_refused():
    with pytest.raises(RecipeError, match="4 phases do not divide the 42 points"):
        speedupnet(points=42)
    with pytest.raises(RecipeError, match=r"share is 1\.0 of 3000 steps"):
        speedupnet(share=1.0)
    assert [stage.steps for stage in speedupnet(steps=100, share=0.3).stages] == [30, 70]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score_steps": (3,)}, r"score_steps is \[3\]; its student has grids for \[1, 2, 4, 8\]"),
        ({"score_steps": ()}, r"score_steps is \[\]"),
        ({"saved": 1}, "saved is 1; .* at least 2"),
        ({"window": 0.0}, "window is 0"),
        ({"rounds": -1}, "rounds -1"),
    ],
)
def test_searches_that_cannot_be_are_refused(settings, message):
    with pytest.raises(RecipeError, match=message):
        lcsc(**settings)
