"""`fewstep bench recipes`: rows, resuming, the short form, what does not fit."""

import json
from dataclasses import replace

import pytest
import torch

from fewstep.trainers.bench import recipes as bench_recipes
from fewstep.trainers.bench.recipes import FEW, QUICK, Setup, command, compare, key_of, listed, on_plane, worse
from fewstep.trainers.bench.recipes_report import SIDE, panel
from fewstep.trainers.errors import RecipeError
from fewstep.trainers.plane import run as plane_run
from fewstep.trainers.plane.run import PlaneBudget, plane_spec, sampling_scale
from fewstep.trainers.recipes.registry import RECIPES

TINY = Setup(budget=PlaneBudget(steps=6, start_steps=6, batch=32, pairs=64), points=64)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    return folder, compare(["lcm", "progressive", "dmd2", "lcm-lora"], TINY, folder)


def test_a_row_has_scores_and_cost_at_each_count(tiny):
    _, report = tiny
    rows = {row["recipe"]: row for row in report["rows"]}
    assert list(rows) == ["lcm", "progressive", "dmd2", "lcm-lora"]
    for row in rows.values():
        assert set(row["steps"]) == {"1", "2", "4"} == set(row["against"])
        assert all(score["swd"] > 0 and 0 <= score["coverage"] <= 1 for score in row["steps"].values())
    # 6 steps of 32: student and target once each; the guided teacher twice at both ends of a step of second order
    assert rows["lcm"]["student_evaluations"] == 2 * 6 * 32 and rows["lcm"]["teacher_evaluations"] == 4 * 6 * 32
    assert report["teacher"]["1"]["steps"]["100"]["swd"] > 0


def test_recipes_trained_at_a_time_share_the_cores():
    threads = torch.get_num_threads()
    torch.set_num_threads(6)
    try:
        with bench_recipes._pool(2) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(threads)


def test_a_second_run_reads_what_is_there_and_trains_what_changed(tiny, monkeypatch):
    folder, report = tiny
    asked = []
    monkeypatch.setattr(plane_run, "run_recipe", lambda recipe, *rest: asked.append(recipe.name))
    again = compare(["lcm", "dmd2"], TINY, folder)
    assert [row["steps"] for row in again["rows"]] == [report["rows"][0]["steps"], report["rows"][2]["steps"]]
    assert asked == []
    assert (report["run"]["trained"], again["run"]["trained"], again["run"]["kept"]) == (4, 0, 2)
    monkeypatch.setitem(RECIPES, "lcm", lambda: RECIPES["lcm-lora"]())
    with pytest.raises(AttributeError):  # the stand-in trains nothing
        compare(["lcm"], TINY, folder)
    assert asked == ["lcm-lora"]


def test_the_key_follows_recipe_and_budget():
    keys = {key_of("lcm", TINY), key_of("dmd2", TINY), key_of("lcm", QUICK)}
    assert len(keys) == 3 and key_of("lcm", TINY) in keys


def test_a_setting_changes_the_keys_of_the_recipes_that_have_it_and_no_others():
    other = replace(TINY, settings={**TINY.settings, "gap_mean": 0.25})
    assert {name for name in ("lcm", "dmd2", "sid", "gdd") if key_of(name, TINY) != key_of(name, other)} == {
        "dmd2",
        "sid",
    }


def test_guidance_is_that_of_the_benchmark():
    assert sampling_scale(on_plane("lcm", TINY)) == 1.0 == sampling_scale(on_plane("dmd2", TINY))
    assert sampling_scale(RECIPES["lcm"]()) == 3.0 == sampling_scale(RECIPES["progressive"]())
    assert plane_spec(RECIPES["lcm"]()).guidance.mode == "embedded"


def test_settings_of_the_benchmark_go_to_the_recipes_that_have_them():
    assert {name: on_plane(name, TINY).objective.step.order for name in ("lcm", "tcd", "pcm")} == dict.fromkeys(
        ("lcm", "tcd", "pcm"), 2
    )
    assert RECIPES["lcm"]().objective.step.order == 1
    assert on_plane("w-embedding", TINY) == RECIPES["w-embedding"]()


def test_what_does_not_fit_is_said():
    chosen, left_out = listed([])
    assert set(FEW) <= set(chosen) and set(chosen) | set(left_out) == set(RECIPES)
    assert "no blocks to change" in left_out["bk-sdm"]
    with pytest.raises(RecipeError, match="no blocks to change"):
        listed(["bk-sdm"])
    with pytest.raises(RecipeError, match="there is no recipe 'lcn'"):
        listed(["lcn"])


def test_the_command_writes_table_json_and_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_recipes, "QUICK", TINY)
    status = command(["progressive", "--quick", "--budget", "8", "--out", str(tmp_path)])
    assert "| progressive | progressive | 1 |" in capsys.readouterr().out
    report = json.loads((tmp_path / "recipes.json").read_text())
    assert status == len(worse(report))
    assert report["setup"]["budget"]["steps"] == 8 and "points" not in report["rows"][0]
    assert (tmp_path / "recipes.png").stat().st_size > 1000
    assert "teacher's ODE, 100 steps" in (tmp_path / "recipes.md").read_text()


def test_the_quick_form_fails_where_a_recipe_is_worse_than_its_teacher():
    rows = [
        {"recipe": "good", "against": {"2": {"better": True}, "10": {"better": False}}},
        {"recipe": "bad", "against": {"10": {"better": True}, "2": {"better": False}}},
    ]
    assert worse({"rows": rows}) == ["bad"]


def test_a_panel_shows_points_where_they_are():
    picture = panel([[0.0, 0.0], [100.0, 0.0], [float("nan"), 0.0], [2.0, 2.0]])
    marked = (picture != 250).any(2)
    assert marked[SIDE // 2 - 2 : SIDE // 2 + 2, SIDE // 2].any() and marked[: SIDE // 4, -SIDE // 4 :].any()
    assert marked.sum() < 20


def test_the_seed_is_that_of_training_and_of_measuring(monkeypatch, tmp_path):
    class Asked(Exception):
        """Holds the setup."""

    def stop(names, setup, folder, *, jobs):
        raise Asked(setup)

    monkeypatch.setattr(bench_recipes, "compare", stop)
    found = {}
    for seed in ("0", "3"):
        with pytest.raises(Asked) as told:
            command(["dmd2", "--quick", "--seed", seed, "--out", str(tmp_path)])
        found[seed] = told.value.args[0]
    assert found["0"] == QUICK and (found["3"].seed, found["3"].budget.seed) == (3, 3)
    assert key_of("dmd2", found["3"]) != key_of("dmd2", QUICK)
