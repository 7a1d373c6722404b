"""Score distillation and laws within an interval: a short run of each, on the plane and on pictures; refusals."""

import dataclasses

import pytest
import torch

from fewstep.models.paths import VP
from fewstep.trainers.bench.recipes import Setup, on_plane
from fewstep.trainers.distribution.discriminator import Adversary, Deceive
from fewstep.trainers.distribution.only import Only
from fewstep.trainers.distribution.stabiliser import GuidanceAlone, MeanVariance
from fewstep.trainers.errors import RecipeError
from fewstep.trainers.networks.student import Student
from fewstep.trainers.oracle.distribution import cast_of
from fewstep.trainers.oracle.suite import check_recipe
from fewstep.trainers.oracle.world import turn, world
from fewstep.trainers.parts.divergences import Divergence
from fewstep.trainers.parts.gan_losses import Hinge
from fewstep.trainers.parts.rollout import Made
from fewstep.trainers.parts.score_times import LANDING, START, Window
from fewstep.trainers.parts.segments import RandomWalk, Segments
from fewstep.trainers.parts.times import EvenGrids, UniformTimes
from fewstep.trainers.plane.plane import CLASSES, conditions, plane
from fewstep.trainers.plane.run import PlaneBudget, run_recipe, sample_points
from fewstep.trainers.recipes.distribution import dmd2
from fewstep.trainers.recipes.multistep import MULTISTEP, decoupled_dmd, phased_dmd, tdm
from fewstep.trainers.recipes.recipe import configure
from fewstep.trainers.recipes.registry import RECIPES
from fewstep.trainers.recipes.score import SCORE, f_distill, snoopi, swiftbrush
from fewstep.trainers.runs.distill import distill
from tiny import tiny_latents

TINY = Setup(budget=PlaneBudget(steps=4, start_steps=4, batch=16, pairs=32), points=8)
FAST = {"batch": 2, "steps": 2, "picture_every": 0, "checkpoint_every": 0, "bf16": False}
NAMES = ["dmd2", *SCORE, *MULTISTEP]


@pytest.mark.parametrize("name", NAMES)
def test_each_trains_and_samples_on_the_plane(name, start):
    recipe = on_plane(name, TINY)
    trained = run_recipe(recipe, plane(), start, TINY.budget)
    cond, uncond = conditions(torch.arange(CLASSES))
    assert tuple(trained.spec.grids) == recipe.steps
    for steps in trained.spec.grids:
        points = sample_points(trained, cond, uncond, steps, seed=0)
        assert points.shape == (CLASSES, 2) and bool(torch.isfinite(points).all())
    kept = start.state_dict()
    assert any(not torch.equal(w, kept[k]) for k, w in trained.net.state_dict().items() if k in kept)


ON_PICTURES = {
    "dmd2": {"every": 1}, "swiftbrush": {"rank": 2}, "dmd": {"pairs": 4, "pair_steps": 2}, "f-distill": {"every": 1},
    "tdm": {}, "phased-dmd": {"every": 1}, "cdm": {"every": 1}, "flash-dmd": {"every": 1},
    "disback": {"every": 1, "steps": 4}, "rcm": {"every": 1, "difference": 0.01},
}  # fmt: skip


@pytest.mark.parametrize("name", ON_PICTURES)
def test_each_kind_trains_on_pictures(name, tiny_teacher, tmp_path):
    data = tiny_latents(tiny_teacher)
    settings = FAST | ON_PICTURES[name]
    student = distill(name, tiny_teacher, tmp_path / name, settings, data=data, device="cpu")
    assert student.spec.recipe == name and student.spec.steps == RECIPES[name]().steps
    new, old = student.load("unet").state_dict(), tiny_teacher.load("unet").state_dict()
    assert list(new) == list(old) and any(not torch.equal(new[k], old[k]) for k in old)


@pytest.mark.parametrize("name", ["vsd", "swiftbrush", "snoopi"])
def test_a_lora_student_and_a_lora_fake_train_on_the_plane(name, start):
    recipe = configure(RECIPES[name], {"student_rank": 2, "rank": 4})
    trained = run_recipe(recipe, plane(), start, TINY.budget)
    learned = {key for key, weight in trained.net.named_parameters() if "lora_B" in key and bool(weight.any())}
    assert learned and (recipe.student.lora_rank, recipe.fake.lora_rank) == (2, 4)


def loss_of(recipe, seed=0):
    stage, objective = world(VP(), "v"), recipe.objective
    cast, _ = cast_of(stage, objective, offset=0.3)
    return objective.loss("student", cast, stage.batch(16), turn(seed))[0]


def test_snoopi_with_a_range_of_no_width_is_swiftbrush():
    for seed in range(3):
        assert torch.equal(loss_of(snoopi(scale_low=4.5, scale_high=4.5), seed), loss_of(swiftbrush(scale=4.5), seed))


def test_f_distill_of_the_reverse_kl_is_dmd2():
    for seed in range(3):
        assert torch.equal(loss_of(f_distill(divergence="rkl"), seed), loss_of(dmd2(), seed))


def test_a_window_is_above_or_below_a_sample_s_own_time():
    path, x = VP(), torch.zeros(200, 2)
    t, s = (torch.full((200,), v, dtype=torch.float64) for v in (600.0, 300.0))
    made = Made(x, x, t, s, x)
    above = Window(UniformTimes(), LANDING, margin=0.05).within(path, made, turn())
    assert 349 <= float(above.min()) < 400 and 900 < float(above.max()) <= 999
    below = Window(UniformTimes(), START, above=False, low=0.1).within(path, made, turn())
    assert 99 <= float(below.min()) < 150 and 550 < float(below.max()) <= 600
    clean = Window(UniformTimes(), LANDING).within(path, Made(x, x, t), turn())
    assert float(clean.min()) < 50
    late = Window(UniformTimes(), START, above=True).within(path, Made(x, x, torch.full_like(t, 999.0)), turn())
    assert bool((late == 999.0).all())


def test_divergences_by_name_and_ratio():
    r = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    t = torch.full((3,), 500.0, dtype=torch.float64)
    plain = {"bins": 0}
    for kind, wanted in {"kl": r, "js": r / (1 + r), "softened": 1 / (1 + r), "hellinger": r.sqrt()}.items():
        found = Divergence(kind, **plain).weights(r.log(), VP(), t)
        assert torch.allclose(found, wanted / wanted.mean())


def told_without_input():
    recipe = dmd2()
    return dataclasses.replace(recipe, fake=Student())


def hinge_ratio():
    adversary = Adversary(student_weight=1.0, critic_weight=1.0, times=UniformTimes(), loss=Hinge())
    objective = f_distill().objective
    gap = objective.terms["student"][0]
    return dataclasses.replace(objective, terms={**objective.terms, "student": (gap, Deceive(adversary))})


def only_apart():
    made = Made(torch.zeros(2, 1), torch.zeros(2, 1), torch.tensor([100.0, 900.0], dtype=torch.float64))
    stage = world(VP(), "v")
    return Only(None, 0.5, 1.0).loss(made, cast_of(stage, dmd2().objective)[0], stage.batch(2), turn())


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (told_without_input, "tells its fake score at which time a step began"),
        (hinge_ratio, "ScoreGap reads log"),
        (only_apart, "a rollout whose batch shares its step"),
        (lambda: Only(None, 0.6, 0.4), "0.6 to 0.4 of the path"),
        (lambda: f_distill(divergence="chi"), "the divergence is 'chi'; known are rkl"),
        (lambda: snoopi(scale_low=5.0, scale_high=3.0), "scales from 5.0 to 3.0"),
        (lambda: phased_dmd(count=4, phases=3), "4 steps do not part into 3 phases"),
        (lambda: Segments(EvenGrids((1, 2))), "one walk has one number"),
        (lambda: RandomWalk(0), "a random walk of 1 to 0 steps"),
        (lambda: Window(UniformTimes(), "middle"), "hangs on 'middle'"),
        (lambda: dataclasses.replace(tdm().objective.terms["student"][0], cfg=False, fake_cfg=True), "cfg is off"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_a_remedy(make, wrong):
    with pytest.raises(RecipeError, match=wrong):
        make()


def steered(weight=1.0):
    """Decoupled DMD with the prior on means and variances in place of matching: no fake score."""
    recipe = decoupled_dmd()
    (stage,) = recipe.stages
    gap, settings = stage.objective.terms["student"][0], stage.player_settings
    terms = {"student": (GuidanceAlone(gap), MeanVariance(weight=weight, mean=0.0, variance=1.0))}
    objective = dataclasses.replace(stage.objective, terms=terms, told=False)
    stage = dataclasses.replace(stage, objective=objective, player_settings={"student": settings["student"]})
    return dataclasses.replace(recipe, fake=Student(), stages=(stage,))


def test_the_oracle_knows_guidance_alone_and_the_prior_on_means_and_variances():
    checks = check_recipe(steered())
    assert [(c.name, c.value, c.low, c.high) for c in checks if not c.passed] == []
    names = [c.name.split(":")[0] for c in checks]
    assert {n: names.count(n) for n in ("mean and variance", "guidance alone", "guidance held")} == {
        "mean and variance": 5, "guidance alone": 4, "guidance held": 2,
    }  # fmt: skip


def test_guidance_held_by_a_prior_trains_without_a_fake_score(start):
    recipe = steered()
    assert recipe.objective.roles == ("student", "teacher")
    trained = run_recipe(recipe, plane(), start, TINY.budget)
    kept = start.state_dict()
    assert any(not torch.equal(w, kept[k]) for k, w in trained.net.state_dict().items() if k in kept)


def test_a_prior_without_variance_and_guidance_without_a_gap_are_refused():
    with pytest.raises(RecipeError, match=r"held to the variance 0\.0 with weight 1\.0; set both above 0"):
        MeanVariance(weight=1.0, mean=0.0, variance=0.0)
    with pytest.raises(RecipeError, match="set both above 0"):
        steered(weight=0.0)
    gap = decoupled_dmd().objective.terms["student"][0]
    for wrong in ({"cfg": False, "augment": None}, {"fake_cfg": True}, {"divergence": Divergence("kl")}):
        with pytest.raises(RecipeError, match="give it a gap with cfg on, and with neither"):
            GuidanceAlone(dataclasses.replace(gap, **wrong))
