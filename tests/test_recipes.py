"""Recipes as whole values: settings, their errors, derived grids, and the rows that other programs read."""

import dataclasses
import itertools
import json
import re

import pytest
from diffusers import DDIMScheduler, LCMScheduler

from fewstep.models.paths import EDM, VP, RectifiedFlow, TrigFlow
from fewstep.trainers.bench.commands import recipe_rows, recipes
from fewstep.trainers.errors import RecipeError
from fewstep.trainers.parts.times import EvenGrids, LcmGrids
from fewstep.trainers.recipes.recipe import Run, configure, describe, parse_setting
from fewstep.trainers.recipes.registry import RECIPES, find_recipe


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_whole_frozen_and_printable(name):
    recipe = RECIPES[name]()
    assert recipe.name == name and recipe.paper and bool(recipe.steps) == (recipe.sampling is not None)
    for stage in recipe.stages:
        assert set(stage.player_settings) == set(stage.objective.players)
        asks = recipe.needs.teacher and stage.pairs is None
        assert {"student"} | ({"teacher"} if asks else set()) <= set(stage.objective.roles)
        assert stage.average in (None, *stage.player_settings["student"].ema)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.objective.guidance = None
    assert json.loads(json.dumps(describe(recipe)))["stages"][0]["objective"]["part"]


def test_settings_reach_the_recipe_and_the_run():
    recipe = configure(RECIPES["dmd2"], {"every": 7, "fake_lr": 1, "batch": 3, "grid_weights": [1, 2, 3], "data": None})
    players = recipe.stages[0].player_settings
    assert players["student"].every == 7 and players["fake"].every == 1
    assert players["fake"].lr == 1.0 and isinstance(players["fake"].lr, float)
    assert recipe.run == Run(batch=3)
    assert recipe.objective.rollout.weights == (1.0, 2.0, 3.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hubber_c": 1.0}, "did you mean 'huber_c'"),
        ({"zzzz": 1.0}, "It has accumulate, batch, "),
        ({"steps": 2.5}, "steps is 2.5; it must be int"),
        ({"lr": "fast"}, "lr is 'fast'; it must be float"),
        ({"bf16": 1}, "bf16 is 1; it must be bool"),
        ({"batch": True}, "batch is True; it must be int"),
        ({"seed": None}, "seed is None; it must be int"),
        ({"init": 3}, "init is 3; it must be str"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(RecipeError, match=message.replace("(", r"\(")):
        configure(RECIPES["lcm"], settings)


IDLE = [
    ("sid", {"gap_std": 1.0}),
    ("sid", {"gan_student": 1e-3}),
    ("sid-few-step", {"anti": -2.0}),
    ("sid-few-step", {"mode": "zero-cfg", "guidance": 5.0}),
    ("sim", {"distance": "squared", "c": 0.5}),
    ("pso", {"offline_beta": 2.0}),
    ("pso", {"offline": True, "clip": 0.2}),
    ("rocm", {"init": "scenes-lcm", "warm": 300}),
    ("rg-lcd", {"proxy_lr": 1e-2}),
    ("finetune-student", {"guidance": 5.0}),
    ("progressive", {"start_steps": 33}),
]


@pytest.mark.parametrize(("name", "settings"), IDLE)
def test_a_setting_that_changes_nothing_is_refused(name, settings):
    idle = list(settings)[-1]
    with pytest.raises(RecipeError, match=f"{idle} is .* and changes nothing of {name} as its other settings are"):
        configure(RECIPES[name], settings)


def test_a_setting_with_what_it_belongs_to_is_taken():
    assert configure(RECIPES["sid"], {"gap_std": 1.0, "gap_mean": 0.5}) != configure(RECIPES["sid"], {"gap_mean": 0.5})
    assert configure(RECIPES["pso"], {"offline": True, "offline_beta": 2.0})
    assert configure(RECIPES["sid"], {"guidance": 3.0}) == RECIPES["sid"](), "its default, told"


def test_drawn_scenes_and_named_pictures_are_not_both_learned():
    with pytest.raises(RecipeError, match="scenes is 8, and data names the pictures"):
        configure(RECIPES["lcm"], {"data": "pictures", "scenes": 8})


@pytest.mark.parametrize("weights", [[1, 1], [0, 0, 0], [1, -1, 1]])
@pytest.mark.parametrize(("name", "counts"), [("dmd2", [1, 2, 4]), ("asd", [1, 2, 3, 4])])
def test_weights_that_do_not_fit_the_step_counts_are_refused(name, counts, weights):
    with pytest.raises(RecipeError, match=f"grid_weights is .* each of the step counts {re.escape(str(counts))}"):
        configure(RECIPES[name], {"grid_weights": weights})


def test_a_student_of_one_step_count_and_more_layers():
    recipe = configure(RECIPES["dmd2"], {"counts": [1], "extra_layers": [0, 2]})
    assert recipe.student.extra_layers == (0, 2) and recipe.fake is not None and not recipe.fake.extra_layers
    assert recipe.objective.rollout.grids.counts == recipe.sampling.grids.counts == (1,)


def test_a_stage_without_steps_is_refused():
    with pytest.raises(RecipeError, match="'segments-8' of hyper-sd has 0 steps; set steps to 4 or more"):
        configure(RECIPES["hyper-sd"], {"steps": 3})


def test_settings_are_read_from_text():
    assert parse_setting("lr=1e-4") == ("lr", 1e-4)
    assert parse_setting("init=runs/a=b") == ("init", "runs/a=b")
    assert parse_setting("grid_weights=[1, 2]") == ("grid_weights", [1, 2])
    assert parse_setting("bf16=false") == ("bf16", False)
    with pytest.raises(RecipeError, match="key=value"):
        parse_setting("lr")


def test_an_unknown_recipe_lists_the_known():
    with pytest.raises(RecipeError, match="lcm, lcm-lora, progressive"):
        find_recipe("lmc")


def test_lcm_grids_are_those_of_diffusers():
    scheduler = LCMScheduler(original_inference_steps=50)
    for steps, times in LcmGrids((1, 2, 3, 4, 5, 8)).of(VP()).items():
        scheduler.set_timesteps(steps)
        assert list(times) == scheduler.timesteps.tolist()


def test_even_grids_are_the_trailing_ones_of_diffusers():
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    for steps, times in EvenGrids((1, 2, 4, 5, 8)).of(VP()).items():
        scheduler.set_timesteps(steps)
        assert list(times) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("path", [EDM(), RectifiedFlow(), TrigFlow(), VP()])
@pytest.mark.parametrize("grids", [LcmGrids((1, 2, 4)), EvenGrids((1, 2, 4))])
def test_grids_fall_from_the_start_on_every_path(path, grids):
    for steps, times in grids.of(path).items():
        assert len(times) == steps and times[0] == pytest.approx(path.start)
        assert all(a > b >= path.end for a, b in itertools.pairwise(times))


def test_progressive_rounds_halve_and_keep_what_is_sold():
    recipe = configure(RECIPES["progressive"], {"start_steps": 16, "final_steps": 2})
    assert [stage.name for stage in recipe.stages] == ["16-to-8", "8-to-4", "4-to-2"]
    assert recipe.steps == (2, 4)
    assert [stage.objective.cfg for stage in recipe.stages] == [True, False, False]
    assert [stage.teacher for stage in recipe.stages] == ["teacher", "previous", "previous"]
    assert [stage.objective.pairs.keep for stage in recipe.stages] == [(), (), (4,)]


def test_lcm_scale_reaches_sampling_and_objective():
    recipe = configure(RECIPES["lcm"], {"guidance_low": 2.0, "guidance_high": 4, "guidance_default": 3.5})
    assert (recipe.objective.guidance.low, recipe.objective.guidance.high) == (2.0, 4.0)
    assert recipe.sampling.guidance_range == (2.0, 4.0) and recipe.sampling.guidance_default == 3.5


def test_rows_for_other_programs(capsys):
    rows = {row["name"]: row for row in recipe_rows()}
    assert list(rows) == list(RECIPES)
    assert rows["dmd2"]["needs"] == {"teacher": True, "data": True, "critic": True, "student": False}
    assert rows["lcm"]["steps"] == [1, 2, 4, 8]
    assert {row["oracle"] for row in rows.values()} <= {"passed", "failed", "none"}
    assert recipes(["--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == list(RECIPES)
    assert recipes([]) == 0
    assert "arXiv:2405.14867" in capsys.readouterr().out
