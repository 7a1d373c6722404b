"""The one loop: exact resume, turns, averages, wiring of gradients, divergence and budgets, on a toy of two players."""

import json
import math

import pytest
import torch
from torch import nn

from fewstep.trainers.errors import CheckpointError, TrainingDiverged
from fewstep.trainers.loop.checkpoint import load_checkpoint, save_checkpoint
from fewstep.trainers.loop.loop import LoopSettings, train
from fewstep.trainers.loop.player import Player, PlayerSettings
from fewstep.trainers.parts.objective import Batch, Turn

STUDENT = PlayerSettings(lr=0.05, every=2, warmup=2, ema={"kept": 0.5})
FAKE = PlayerSettings(lr=0.03)


class Source:
    def batch(self, step):
        rng = torch.Generator().manual_seed(step)
        return Batch(torch.randn(8, 3, generator=rng), {}, {})


class Toy:
    """The student maps noise to the data, through a network with dropout; the fake follows the student."""

    def __init__(self, student=STUDENT, fake=FAKE, poison=()):
        torch.manual_seed(0)
        self.players = (
            Player("student", nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.3), nn.Linear(16, 3)), student),
            Player("fake", nn.Linear(3, 3), fake),
        )
        self.poison = poison
        self.seen = []

    def loss(self, player, batch, turn):
        self.seen.append((turn.step, player))
        self.progress = turn.progress
        student, fake = (p.module for p in self.players)
        made = student(turn.noise(batch.x0))
        value = (
            (fake(made) - batch.x0).square().mean()
            if player == "student"
            else (fake(made.detach()) - made).abs().mean()
        )
        if turn.step in self.poison:
            value = value * math.nan
        return value, {"extra": 1.0}


def run(folder, steps, method=None, resume=False, **settings):
    method = method or Toy()
    out = train(method, Source(), LoopSettings(steps=steps, bf16=False, **settings), folder, resume=resume)
    return method, out


def weights(method):
    return [t for p in method.players for m in (p.module, *p.averages.values()) for t in m.state_dict().values()]


def test_resume_is_bit_equal_to_an_unbroken_run(tmp_path):
    straight, _ = run(tmp_path / "a", 10)
    torch.manual_seed(99)
    interrupted = Toy()
    with pytest.raises(KeyboardInterrupt):
        stop_at(5, interrupted, tmp_path / "b")
    resumed, outcome = run(tmp_path / "b", 10, resume=True)
    assert outcome.steps == 10
    assert all(torch.equal(a, b) for a, b in zip(weights(straight), weights(resumed), strict=True))
    rows = [(tmp_path / x / "metrics.jsonl").read_text() for x in "ab"]
    assert rows[0] == rows[1]


def stop_at(step, method, folder):
    """Fail in the middle of `step`, after the checkpoint of the step before and some rows past it."""
    loss = method.loss

    def broken(player, batch, turn):
        if turn.step == step + 1:
            raise KeyboardInterrupt
        return loss(player, batch, turn)

    method.loss = broken
    run(folder, 10, method, checkpoint_every=step)


def test_players_take_their_turns(tmp_path):
    method, _ = run(tmp_path, 9)
    assert [s for s, who in method.seen if who == "student"] == [1, 3, 5, 7]
    assert [s for s, who in method.seen if who == "fake"] == list(range(9))
    assert [p.own_steps for p in method.players] == [4, 9]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 13 and all(row["extra"] == 1.0 and row["norm"] > 0 for row in rows)
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_a_turn_leaves_no_gradient_in_others(tmp_path):
    method = Toy()
    student, fake = method.players
    before = [w.detach().clone() for w in fake.weights]
    loss = method.loss
    wanted = []

    def watch(player, batch, turn):
        wanted.append((player, student.weights[0].requires_grad, fake.weights[0].requires_grad))
        return loss(player, batch, turn)

    method.loss = watch
    student.settings, fake.settings = PlayerSettings(lr=0.1), PlayerSettings(lr=0.0)
    run(tmp_path, 2, method)
    assert wanted[0] == ("student", True, False) and wanted[1] == ("fake", False, True)
    assert all(torch.equal(a, b) for a, b in zip(before, fake.weights, strict=True))
    assert all(w.grad is None for w in [*student.weights, *fake.weights])


def test_average_follows_its_closed_form():
    torch.manual_seed(0)
    player = Player("p", nn.Linear(1, 1, bias=False), PlayerSettings(lr=0.1, ema={"kept": 0.9}))
    expected = player.module.weight.item()
    for n in range(1, 6):
        player.update(player.module(torch.ones(4, 1)).square().mean(), 0.0)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * player.module.weight.item()
    assert player.averages["kept"].weight.item() == pytest.approx(expected, abs=1e-6)
    assert not player.averages["kept"].weight.requires_grad


def test_rate_rises_and_cools():
    player = Player("p", nn.Linear(1, 1), PlayerSettings(lr=1.0, warmup=4, cooldown=0.5))
    assert player.rate(0.0) == 0.25
    player.own_steps = 10
    assert [player.rate(p) for p in (0.2, 0.5, 0.75, 1.0)] == [1.0, 1.0, 0.5, 0.0]


def test_one_bad_step_is_skipped_and_counted(tmp_path):
    method, outcome = run(tmp_path, 4, Toy(poison=(1,)))
    assert outcome.skipped == 1
    assert [p.own_steps for p in method.players] == [1, 3]
    assert all(torch.isfinite(w).all() for w in weights(method))


def test_divergence_stops_with_a_remedy(tmp_path):
    toy = Toy(poison=range(2, 50))
    said = r"3 bad steps in a row up to step 5, first at step 2: fake loss and norm \(not finite\). The last good"
    with pytest.raises(TrainingDiverged, match=said) as told:
        run(tmp_path, 50, toy, max_bad_steps=3)
    assert f"checkpoint is in {tmp_path}. Try a lower lr (it was 0.03)" in str(told.value)
    kept = load_checkpoint(tmp_path / "checkpoint.pt")
    assert kept["own_steps"] == {"student": 1, "fake": 2}
    assert all(torch.isfinite(w).all() for found in kept["players"].values() for w in found.values())


class Exploding(Toy):
    """The fake's loss is a million times what it was from step 60 on."""

    def loss(self, player, batch, turn):
        value, told = super().loss(player, batch, turn)
        return value * (1e6 if turn.step >= 60 and player == "fake" else 1.0), told | {"term": float(value.detach())}


def test_an_exploding_loss_stops_the_run_too(tmp_path):
    with pytest.raises(
        TrainingDiverged, match=r"4 bad steps .* up to step 64, first at step 60: fake loss \(.*usually"
    ):
        run(tmp_path, 200, Exploding(), max_bad_steps=4, checkpoint_every=31)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 31, "not 62, when a loss had exploded already"


class Late(Toy):
    """Nothing is asked of the fake before step 60, and next to nothing then, as of DisBack's student."""

    def loss(self, player, batch, turn):
        value, told = super().loss(player, batch, turn)
        asked = player != "fake" or turn.step >= 60
        return value * (0.0 if not asked else 1e-6 if turn.step == 60 else 1.0), told


def test_a_player_of_whom_nothing_was_asked_has_no_usual_loss(tmp_path):
    _, outcome = run(tmp_path, 150, Late(fake=PlayerSettings(lr=1e-3)), max_bad_steps=4)
    assert outcome.skipped == 0


def test_a_term_that_is_not_finite_is_named(tmp_path):
    toy = Toy()
    loss = toy.loss
    toy.loss = lambda player, batch, turn: (loss(player, batch, turn)[0] * math.inf, {"gan_critic": math.inf})
    with pytest.raises(TrainingDiverged, match=r"fake gan_critic \(not finite\)"):
        run(tmp_path, 9, toy, max_bad_steps=1)


def test_time_budget_ends_the_run_and_cools_the_rate(tmp_path):
    method, outcome = run(tmp_path, 1_000_000, Toy(fake=PlayerSettings(lr=1.0, cooldown=1.0)), max_seconds=0.4)
    assert method.progress > 0.3, "what is scheduled over the run sees the time too"
    assert 0 < outcome.steps < 1_000_000 and 0.4 <= outcome.seconds < 20
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [row["lr"] for row in rows if row["player"] == "fake"]
    assert rates[0] == 1.0 and rates[-1] < 1.0


def test_pictures_come_at_their_steps(tmp_path):
    shown = []
    train(Toy(), Source(), LoopSettings(steps=7, bf16=True, picture_every=3), tmp_path, on_picture=shown.append)
    assert shown == [3, 6]


def test_resume_needs_a_checkpoint_of_the_same_players(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        run(tmp_path / "none", 3, resume=True)
    run(tmp_path / "one", 2)
    other = Toy()
    other.players = other.players[:1]
    with pytest.raises(CheckpointError, match="fake"):
        run(tmp_path / "one", 3, other, resume=True)


def test_checkpoints_hold_no_code(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"x": Source()}, path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(path)
    save_checkpoint(path, {"step": 3, "w": torch.ones(2)})
    assert load_checkpoint(path)["step"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_draws_depend_on_seed_step_and_player_only():
    like = torch.zeros(5)
    first = Turn.of(0, 7, 100, "student")
    assert torch.equal(first.noise(like), Turn.of(0, 7, 900, "student").noise(like))
    others = [Turn.of(1, 7, 100, "student"), Turn.of(0, 8, 100, "student"), Turn.of(0, 7, 100, "fake")]
    again = Turn.of(0, 7, 100, "student").noise(like)
    assert all(not torch.equal(again, other.noise(like)) for other in others)
    first.share_dropout()
    mask = torch.rand(4)
    first.share_dropout()
    assert torch.equal(mask, torch.rand(4))
