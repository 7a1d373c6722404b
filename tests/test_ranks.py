"""Two processes on gloo, with whole or sharded weights, are one process with the joint batch; so are two passes."""

import json
import multiprocessing
import os
import socket
from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from fewstep.models.paths import VP
from fewstep.trainers.errors import RecipeError
from fewstep.trainers.loop.loop import LoopSettings, train
from fewstep.trainers.loop.ranks import ALONE, Ranks, join, leave, whole
from fewstep.trainers.networks.student import again, build_student
from fewstep.trainers.parts.objective import Batch, Part, Turn
from fewstep.trainers.pictures.data import LatentSource
from fewstep.trainers.plane import run as plane_run
from fewstep.trainers.plane.net import PlaneNet
from fewstep.trainers.plane.plane import plane
from fewstep.trainers.plane.run import PlaneBudget
from fewstep.trainers.recipes.recipe import configure
from fewstep.trainers.recipes.registry import RECIPES
from fewstep.trainers.runs.distill import assemble
from fewstep.trainers.runs.sharing import check_shares, whole_batch
from tiny import tiny_latents

BATCH, STEPS = 8, 3
SETTINGS = {"dmd2": {"every": 2}, "lcm": {"guidance_width": 32}}
LR = 1e-3


def recipe_of(name):
    recipe = configure(RECIPES[name], SETTINGS[name] | {"batch": BATCH, "bf16": False})
    stage = recipe.stages[0]
    quick = {who: replace(how, lr=LR, warmup=0, cooldown=0.0) for who, how in stage.player_settings.items()}
    return replace(recipe, stages=(replace(stage, player_settings=quick),))


def trained(name, teacher, data, folder, ranks=ALONE, steps=STEPS, accumulate=1, resume=False):
    """Train a little; leaves the metrics, and all tensors in tensors.pt, in `folder`."""
    recipe = recipe_of(name)
    torch.manual_seed(0)
    learner = build_student(teacher, recipe.student, fold_scale=1.0)
    frozen = again(teacher.load("unet"), replace(recipe.student, guidance_width=None))
    method = assemble(recipe, recipe.stages[0], teacher, frozen, learner, ranks)
    source = LatentSource(data, teacher.text_encoder(), BATCH, spec=teacher.spec, part=ranks.part)
    settings = LoopSettings(steps=steps, bf16=False, checkpoint_every=0, accumulate=accumulate)
    train(method, source, settings, folder, resume=resume, ranks=ranks)
    tensors = {f"{p.name} {name}": whole(value).clone() for p in method.players for name, value in p.tensors().items()}
    if ranks.first:
        torch.save(tensors, folder / "tensors.pt")


def one_of_two(index, port, teacher, data, folder):
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(index), "LOCAL_RANK": str(index)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = join("cpu")
    sharded = replace(ranks, sharded=True)
    for name in SETTINGS:
        trained(name, teacher, data, folder / f"{name}-ddp", ranks)
        trained(name, teacher, data, folder / f"{name}-fsdp", sharded)
    trained("dmd2", teacher, data, folder / "dmd2-both", sharded, accumulate=2)
    trained("dmd2", teacher, data, folder / "dmd2-cut", sharded, steps=2)
    trained("dmd2", teacher, data, folder / "dmd2-whole-cut", ranks, steps=2)
    leave(ranks)


@pytest.fixture(scope="module")
def runs(tiny_teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    data = tiny_latents(tiny_teacher)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=one_of_two, args=(k, port, tiny_teacher, data, folder)) for k in range(2)]
    for process in processes:
        process.start()
    for name in SETTINGS:
        trained(name, tiny_teacher, data, folder / f"{name}-one")
        trained(name, tiny_teacher, data, folder / f"{name}-passes", accumulate=2)
    for process in processes:
        process.join(150)
    assert [process.exitcode for process in processes] == [0, 0]
    return folder


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(one, other):
    """The same losses and gradients, and weights but for those whose gradient is rounding alone."""
    for a, b in zip(rows_of(one), rows_of(other), strict=True):
        assert (a["step"], a["player"]) == (b["step"], b["player"])
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-4)
        assert b["norm"] == pytest.approx(a["norm"], rel=2e-3)
    first, second = (torch.load(folder / "tensors.pt") for folder in (one, other))
    assert first.keys() == second.keys()
    for name, value in first.items():
        apart = (value.float() - second[name].float()).abs().flatten()
        if "optimizer" not in name:
            assert float(apart.max()) <= 2 * LR * STEPS and float(apart.quantile(0.9)) < 1e-5, name
        else:
            assert torch.allclose(value, second[name], rtol=1e-2, atol=1e-5), name


@pytest.mark.parametrize("way", ["ddp", "fsdp", "passes"])
@pytest.mark.parametrize("name", list(SETTINGS))
def test_parts_are_one_process_with_the_joint_batch(runs, name, way):
    assert_same(runs / f"{name}-one", runs / f"{name}-{way}")
    assert len(rows_of(runs / f"{name}-{way}")) == {"dmd2": 4, "lcm": 3}[name], "the first process alone writes"


def test_two_processes_of_two_passes_each(runs):
    assert_same(runs / "dmd2-one", runs / "dmd2-both")


@pytest.mark.parametrize("cut", ["dmd2-cut", "dmd2-whole-cut"])
def test_what_two_processes_saved_one_goes_on_with(runs, tiny_teacher, cut):
    kept = sorted(p.name for p in (runs / cut).iterdir() if p.name.startswith("checkpoint"))
    assert kept == (["checkpoint-00000002", "checkpoint.json"] if cut == "dmd2-cut" else ["checkpoint.pt"])
    trained("dmd2", tiny_teacher, tiny_latents(tiny_teacher), runs / cut, resume=True)
    assert_same(runs / "dmd2-one", runs / cut)
    assert [p.name for p in (runs / cut).glob("checkpoint*")] == ["checkpoint.pt"], "of the old ones none is left"


def test_draws_of_parts_are_the_joint_draw():
    joint, halves = Turn.of(0, 7, 9, "fake"), [Turn.of(0, 7, 9, "fake", part=Part(k, 2)) for k in range(2)]
    like, weights = torch.zeros(6, 2), torch.rand(5)
    draws = [
        lambda turn, n: turn.noise(like[:n]),
        lambda turn, n: turn.uniform(0.0, 2.0, n),
        lambda turn, n: turn.integers(9, n),
        lambda turn, n: turn.choose(weights, n),
        lambda turn, n: turn.normal(n),
        lambda turn, n: turn.places(n),
    ]
    for draw in draws:
        together, (even, odd) = draw(joint, 6), (draw(half, 3) for half in halves)
        assert torch.equal(together[::2], even) and torch.equal(together[1::2], odd)
        assert not torch.equal(even, odd), "parts have draws of their own"
        picked = {turn.pick(torch.ones(1000)) for turn in (joint, *halves)}
        assert len(picked) == 1, "what the batch shares is one draw"
    assert Part(1, 2).within(1, 3) == Part(3, 6)
    assert halves[1].dropout_seed != halves[0].dropout_seed == joint.dropout_seed


def test_a_batch_that_does_not_divide_is_refused():
    recipe = configure(RECIPES["lcm"], {"batch": 64, "accumulate": 3})
    with pytest.raises(RecipeError, match=r"64 in all, and 2 processes x accumulate 3 .* set batch to 66"):
        check_shares(recipe, Ranks(0, 2))
    with pytest.raises(RecipeError, match="accumulate is 0"):
        check_shares(configure(RECIPES["lcm"], {"accumulate": 0}), ALONE)
    with pytest.raises(RecipeError, match=r"5 samples cannot be shared evenly by 2, 1 are left over"):
        Part(0, 2).of(Batch(torch.zeros(5, 1), {}, {}))
    with pytest.raises(RecipeError, match="parallel is 'zero'; it must be one of ddp, fsdp"):
        join("cpu", mode="zero")


def test_what_needs_its_whole_batch_is_refused_by_name():
    found = {name: whole_batch(function().objective) for name, function in RECIPES.items()}
    named = {name: found[name] for name in ("imm", "sct", "slct", "speedupnet", "bk-sdm", "dmd2", "lcm")}
    assert named == {
        "imm": "MomentMatching", "sct": "ReferenceBatch", "slct": "Consistency", "speedupnet": "Avoiding",
        "bk-sdm": "KnowledgeDistillation", "dmd2": None, "lcm": None,
    }  # fmt: skip
    with pytest.raises(RecipeError, match=r"imm compares samples .* \(MomentMatching\), so 2 parts"):
        check_shares(configure(RECIPES["imm"], {"accumulate": 2}), ALONE)
    with pytest.raises(RecipeError, match="searches among whole checkpoints"):
        check_shares(configure(RECIPES["lcsc"], {}), Ranks(0, 2, sharded=True))


def parts_apart(method, source, parts):
    """The largest change of a player's gradient, relative to its norm, when the batch is seen in parts."""
    batch, worst = source.batch(0), 0.0
    for player in method.players:
        found = []
        for count in (1, parts):
            for other in method.players:
                other.gradients(other is player)
            player.forget()
            for k in range(count):
                part = Part(k, count)
                turn = Turn.of(0, 3, 9, player.name, part=part)
                turn.share_dropout()
                player.learn(method.loss(player.name, part.of(batch), turn)[0] / count)
            found.append(torch.cat([w.grad.flatten() for w in player.weights if w.grad is not None]))
        worst = max(worst, float((found[0] - found[1]).norm() / found[0].norm().clamp(min=1e-6)))
    return worst


def test_every_recipe_is_exact_in_parts_or_says_that_it_is_not(monkeypatch):
    """Each stage as the plane trains it, but that its loop is run by nobody: its method and source are looked at."""
    data, start, budget = plane(), PlaneNet(VP(), width=16), PlaneBudget(batch=24, pairs=24, steps=4)
    apart = {}

    def look(method, source, *others, label, **settings):
        objective = getattr(method, "method", method).objective
        if parts_apart(method, source, 2) > 1e-3:
            apart[label] = whole_batch(objective)

    monkeypatch.setattr(plane_run, "train", look)
    monkeypatch.setattr(plane_run, "settle", lambda *given: None)
    for function in RECIPES.values():
        with suppress(RecipeError):  # what only pictures' networks can follow
            plane_run.run_recipe(function(), data, start, budget)
    assert set(apart) >= {"imm", "sct", "slct"} and None not in apart.values(), apart
