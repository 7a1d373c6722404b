"""Straight trajectories, moment matching and the twin: a short run of each, on the plane and on pictures; refusals."""

import dataclasses

import pytest
import torch

from fewstep.models.paths import VP
from fewstep.trainers.bench.recipes import Setup, on_plane
from fewstep.trainers.errors import DataError, RecipeError
from fewstep.trainers.objectives.moments import Laplace, discrepancy
from fewstep.trainers.objectives.twin import twin
from fewstep.trainers.oracle.world import world
from fewstep.trainers.parts.objective import Cast, Turn
from fewstep.trainers.plane.plane import CLASSES, conditions, plane
from fewstep.trainers.plane.run import PlaneBudget, run_recipe, sample_points
from fewstep.trainers.recipes.matching import MATCHING, imm, twinflow
from fewstep.trainers.recipes.registry import RECIPES
from fewstep.trainers.recipes.straight import STRAIGHT, consistency_fm, scflow, traflow
from fewstep.trainers.runs.distill import distill
from tiny import tiny_latents

TINY = Setup(budget=PlaneBudget(steps=4, start_steps=4, batch=16, pairs=32), points=8)
FAST = {"batch": 4, "steps": 2, "picture_every": 0, "checkpoint_every": 0, "bf16": False}
NAMES = [*STRAIGHT, *MATCHING]


@pytest.mark.parametrize("name", NAMES)
def test_each_trains_and_samples_on_the_plane(name, start):
    trained = run_recipe(on_plane(name, TINY), plane(), start, TINY.budget)
    cond, uncond = conditions(torch.arange(CLASSES))
    assert set(trained.spec.grids) >= {1, 2, 4}
    for steps in trained.spec.grids:
        points = sample_points(trained, cond, uncond, steps, seed=0)
        assert points.shape == (CLASSES, 2) and bool(torch.isfinite(points).all())
    kept = start.state_dict()
    assert any(not torch.equal(w, kept[k]) for k, w in trained.net.state_dict().items() if k in kept)


def loss_of(recipe, count, noise=False):
    stage = world(VP(), "v")
    batch = stage.batch(count)
    batch = dataclasses.replace(batch, noise=batch.x0) if noise else batch
    told = stage.jumper(lambda t, cond: cond["s"])
    return recipe.objective.loss("student", Cast({"student": told}), batch, Turn.of(0, 0, 1, "student"))


@pytest.mark.parametrize("player", ["student", "fake"])
def test_scflow_can_judge_samples_without_noise(player):
    objective = scflow(gan_share=1.0).objective
    objective = dataclasses.replace(objective, adversary=dataclasses.replace(objective.adversary, times=None))
    stage, judged = world(VP(), "v"), []
    batch, told = stage.batch(4), stage.jumper(None, takes_w=True)

    def critic(x, t, cond):
        judged.append(x)
        return x.flatten(1).mean(1)

    cast = Cast({"student": told, "target": told, "teacher": stage.teacher()}, critic)
    objective.loss(player, cast, batch, Turn.of(0, 0, 1, player))
    assert len(judged) == (1 if player == "student" else 2)
    assert torch.equal(judged[0], batch.x0) == (player == "fake")


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (lambda: loss_of(imm(group=4), 6), "groups of 4, and the batch is 6; set batch"),
        (lambda: loss_of(twinflow(), 3), "batch in four, and this one is 3; set batch"),
        (lambda: twinflow(guidance=0.5), "guidance is 0.5"),
        (lambda: consistency_fm(points=50, segments=4), "50 points do not part into 4 segments"),
        (lambda: imm(group=0), "group is 0"),
        (lambda: scflow(reach=0.0), "reach is 0.0"),
        (lambda: traflow(output=0.0, velocity=0.0, consistency=0.0), "no target has a weight"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_a_remedy(make, wrong):
    with pytest.raises(RecipeError, match=wrong):
        make()


def test_traflow_needs_pairs():
    with pytest.raises(DataError, match="give its stage pairs"):
        loss_of(traflow(), 4)
    assert torch.isfinite(loss_of(traflow(), 4, noise=True)[0])


def test_scflow_without_its_adversary_has_no_critic():
    alone = scflow(gan=0.0)
    assert alone.objective.players == ("student",) and not alone.needs.critic
    assert scflow().objective.players == ("student", "fake") and scflow().needs.critic


def test_rows_of_other_conditions_are_left_out():
    y = torch.tensor([[[0.0], [5.0]]])
    aim, scale = torch.tensor([[[1.0], [9.0]]]), torch.ones(1)
    alone = torch.eye(2, dtype=torch.bool)[None]
    kernel = Laplace(1.0)
    wanted = 2.0 - torch.tensor([1.0, 4.0]).neg().exp().sum()
    torch.testing.assert_close(discrepancy(kernel, y, aim, scale, alone)[0], wanted)
    assert not torch.allclose(discrepancy(kernel, y, aim, scale)[0], wanted)


def test_the_planes_network_knows_negative_times(start):
    net, t = start.denoiser(), torch.tensor([999.0, 400.0, 3.0])
    x, cond = torch.randn(3, 2), conditions(torch.arange(3))[0]
    ahead, back = net.raw(x, t, cond), twin(net).raw(x, t, cond)
    assert bool(torch.isfinite(back).all()) and not torch.allclose(ahead, back, atol=1e-3)
    other = twin(net).raw(x, torch.tensor([700.0, 400.0, 3.0]), cond)
    assert not torch.allclose(back[0], other[0], atol=1e-3) and torch.allclose(back[1:], other[1:], atol=1e-6)


@pytest.fixture(scope="module")
def pictures(tiny_teacher):
    return tiny_latents(tiny_teacher)


@pytest.mark.parametrize("name", NAMES)
def test_each_trains_and_samples_pictures(name, tiny_teacher, pictures, tmp_path):
    extra = {"pairs": 5, "pair_steps": 2} if name == "traflow" else {}
    out = tmp_path / f"tiny-{name}"
    student = distill(name, tiny_teacher, out, FAST | extra, data=pictures, device="cpu")
    assert student.spec.recipe == name and student.spec.steps == RECIPES[name]().steps
    shown = out.with_name(out.name + ".run") / name / "samples"
    assert list(shown.glob("step_*.png")), "its own bundle's sampler has drawn pictures"
