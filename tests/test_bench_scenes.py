"""`fewstep bench scenes`: one budget for every recipe, results that are read back, and students that are measured."""

import json

import pytest

from fewstep.trainers.bench import scenes as bench_scenes
from fewstep.trainers.bench.scenes import FLAGSHIPS, SceneBudget, budgeted, markdown
from fewstep.trainers.errors import RecipeError
from tiny import tiny_latents

TINY = SceneBudget(steps=2, batch=4, prompts=8)


def test_every_flagship_gets_the_same_budget():
    for name in FLAGSHIPS:
        recipe = budgeted(name, SceneBudget(steps=400, batch=8, seed=3))
        assert abs(sum(stage.steps for stage in recipe.stages) - 400) <= len(recipe.stages)
        assert (recipe.run.batch, recipe.run.seed) == (8, 3)


@pytest.mark.parametrize(("name", "said"), [("lcn", "recipes are"), ("ppcl", "sampled as their teacher")])
def test_what_cannot_be_compared_is_refused_before_any_training(name, said):
    with pytest.raises(RecipeError, match=said):
        bench_scenes.command(["lcm", name])


def test_recipes_are_trained_measured_and_read_back(tiny_teacher, tmp_path, short_prompts, monkeypatch):
    data = tiny_latents(tiny_teacher)
    saved = []
    report = bench_scenes.bench_scenes(
        ("lcm", "anyflow"),
        tiny_teacher,
        tmp_path,
        TINY,
        data=data,
        save=lambda report: saved.append(json.dumps(report)),
    )
    assert [row["steps"] for row in report["teacher_rows"]] == [4, 25]
    assert [(row["recipe"], row["steps"]) for row in report["rows"]] == [
        (name, steps) for name in ("lcm", "anyflow") for steps in (1, 2, 4)
    ]
    assert all(
        row["frechet"] > 0 and 0 <= row["compliance"] <= 1 and row["train_seconds"] > 0 for row in report["rows"]
    )
    assert len(saved) == 2 and "anyflow" in markdown(report)
    monkeypatch.setattr(bench_scenes, "load_bundle", lambda root: pytest.fail("it was done already"))
    again = bench_scenes.bench_scenes(("lcm", "anyflow"), tiny_teacher, tmp_path, TINY, data=data)
    assert again["rows"] == report["rows"]
