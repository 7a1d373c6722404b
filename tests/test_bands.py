"""A run inside its bands is silent; one outside says so once per metric, and what it means."""

import json
from dataclasses import replace

import pytest
import torch

from fewstep.models.paths import VP
from fewstep.trainers.errors import DataError
from fewstep.trainers.loop.bands import MEANINGS, TENTHS, Watch, bands_of, main, make_bands
from fewstep.trainers.loop.loop import LoopSettings, train
from fewstep.trainers.plane.net import PlaneNet, plane_student
from fewstep.trainers.plane.plane import PlaneSource, plane
from fewstep.trainers.plane.run import Count, PlaneBudget, _assemble
from fewstep.trainers.recipes.registry import RECIPES
from fewstep.trainers.runs.distill import _alike

STEPS = 60


def trained(folder, seed, rate=1.0, watch=None):
    """lcm on the plane for a moment; returns its metrics' file."""
    recipe, budget = RECIPES["lcm"](), PlaneBudget(batch=32, rate=rate)
    torch.manual_seed(0)
    start = PlaneNet(VP(), width=24)
    net = plane_student(start, recipe.student, path=VP(), seed=0)
    stage = recipe.stages[0]
    quick = {who: replace(how, warmup=0) for who, how in stage.player_settings.items()}
    stage = replace(stage, player_settings=quick)
    method = _assemble(recipe, stage, net, start, None, plane(), budget, Count())
    settings = LoopSettings(steps=STEPS, seed=seed, bf16=False, checkpoint_every=0)
    train(method, PlaneSource(plane(), 32, seed=seed), settings, folder, on_row=None if watch is None else watch.see)
    return folder / "metrics.jsonl"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return [trained(tmp_path_factory.mktemp("seed"), seed) for seed in range(3)]


def test_a_run_inside_its_bands_says_nothing(files, tmp_path):
    said = []
    watch = Watch(make_bands(files), said.append)
    trained(tmp_path, 9, watch=watch)
    assert said == [] and watch.outside == {}
    assert set(watch.bands) == {"student.loss", "student.residual", "student.norm"}
    assert all(len(band) == TENTHS and all(low < high for low, high in band) for band in watch.bands.values())


def test_a_run_outside_says_so_once_and_what_it_means(files, tmp_path):
    said = []
    watch = Watch(make_bands(files), said.append)
    trained(tmp_path, 9, rate=3000.0, watch=watch)
    assert len(said) == len(watch.outside) == len({text.split(": ")[1].split(" is ")[0] for text in said}) > 0
    (text,) = [text for text in said if "student.loss" in text]
    assert "expected" in text and text.endswith(MEANINGS["student.loss"][0])


def test_a_critic_that_has_won_is_named():
    watch = Watch({"fake.critic_right": [(0.3, 0.9)] * TENTHS}, lambda text: None)
    for step in range(40):
        watch.see({"step": step, "player": "fake", "lr": 1.0, "skipped": 0.0, "critic_right": 1.0}, step / 40)
    assert list(watch.outside) == ["fake.critic_right"]
    assert watch.outside["fake.critic_right"].startswith(
        "step 9: fake.critic_right is 1, expected 0.3 to 0.9: the critic"
    )


def test_the_command_writes_what_a_run_reads(files, tmp_path, capsys):
    out = tmp_path / "lcm.json"
    assert main(["lcm", *map(str, files), "--out", str(out)]) == 0
    told = json.loads(out.read_text())
    assert told["runs"] == 3 and "student.loss" in capsys.readouterr().out
    assert told["bands"]["student.loss"] == [list(band) for band in make_bands(files)["student.loss"]]
    with pytest.raises(DataError, match="1 runs make no band"):
        make_bands(files[:1])
    (tmp_path / "other").write_text("{}")
    with pytest.raises(DataError, match="holds no metrics of a run"):
        make_bands([tmp_path / "other", files[0]])


def test_stages_that_do_one_thing_share_their_bands():
    assert _alike(RECIPES["msd"]()) and _alike(RECIPES["dmd2"]())
    assert not _alike(RECIPES["instaflow"]()), "reflow and distillation are two things"


@pytest.mark.parametrize("recipe", ["lcm", "dmd2", "f-distill", "rcm", "tdm", "sid", "ladd", "msd"])
def test_flagships_ship_their_bands(recipe):
    bands = bands_of(recipe)
    assert {f"{player}.loss" for player in RECIPES[recipe]().objective.players} <= bands.keys()
    assert set(bands) <= MEANINGS.keys(), "every metric of a flagship has a meaning"
    assert bands_of("no-such-recipe") == {}
