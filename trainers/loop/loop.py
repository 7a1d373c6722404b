"""The one training loop. It knows players and losses, and no method.

Order of one step: each player whose turn it is, in the method's order, sees the same batch and random draws of its own.
Batches and draws are functions of (seed, step), so a resumed run equals an unbroken one bit for bit. A step's batch may
be shared out over processes and passes, whose gradients are averaged: together they are one process with all of it.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import CheckpointError, RecipeError
from ..parts.objective import Batch, Metrics, Part, Turn
from .checkpoint import keep, restore
from .health import Health, diverged
from .player import Player
from .ranks import ALONE, Ranks


class Method(Protocol):
    """Who trains, and each one's loss. Further networks it needs are its own business."""

    @property
    def players(self) -> Sequence[Player]: ...

    def loss(self, player: str, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]: ...


class Source(Protocol):
    """Batches as a pure function of the step: this process's rows of the joint batch."""

    def batch(self, step: int) -> Batch: ...


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """A run's length and habits. `max_seconds` ends it early and counts as progress, so the cooldown still happens.

    accumulate: passes that a batch is shared out over, so that only so large a part of it is in memory at a time.
    """

    steps: int
    seed: int = 0
    accumulate: int = 1
    bf16: bool = True
    max_seconds: float | None = None
    checkpoint_every: int = 500
    picture_every: int = 0
    max_bad_steps: int = 20


@dataclass(frozen=True)
class Outcome:
    steps: int
    seconds: float
    skipped: int


def train(
    method: Method, source: Source, settings: LoopSettings, folder: Path, *, resume: bool = False, label: str = "train",
    device: torch.device | str = "cpu", on_picture: Callable[[int], None] | None = None, ranks: Ranks = ALONE,
    on_row: Callable[[Mapping[str, Any], float], None] | None = None,
) -> Outcome:  # fmt: skip
    """Run to `settings.steps` or `settings.max_seconds`; leaves a checkpoint, metrics.jsonl and loss.png in `folder`.

    ranks: the processes that train together; the first of them writes, but for shards. on_row: is told each row of
    metrics, and the progress of the run.

    Errors: `TrainingDiverged` after `max_bad_steps` bad steps in a row (`trainers.loop.health`); `CheckpointError` on a
    resume of something that is not there or has other players.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = _restore(folder, method.players) if resume else _Place()
    if ranks.first:
        _cut_metrics(folder / "metrics.jsonl", place.step)
    started = time.monotonic() - place.seconds
    bar = tqdm(total=settings.steps, initial=place.step, desc=label, dynamic_ncols=True, disable=not ranks.first)
    with (folder / "metrics.jsonl" if ranks.first else Path(os.devnull)).open("a") as log, bar:
        while (progress := _progress(place, settings)) < 1.0:
            rows = _step(method, source, place.step, progress, settings, torch.device(device), ranks)
            place = place.after(rows, ranks.mean([time.monotonic() - started])[0])
            for row in rows:
                log.write(json.dumps(row) + "\n")
                if on_row is not None:
                    on_row(row, progress)
            bar.set_postfix({f"{row['player']} loss": f"{row['loss']:.4g}" for row in rows}, refresh=False)
            bar.update()
            if place.health.bad >= settings.max_bad_steps:
                log.flush()
                if place.health.harmless:
                    _keep(folder, method.players, place, ranks)
                raise diverged(place.health, place.step, folder, settings.bf16)
            due = settings.checkpoint_every and place.step % settings.checkpoint_every == 0
            if due and place.health.harmless:
                log.flush()
                _keep(folder, method.players, place, ranks)
            if on_picture is not None and settings.picture_every and place.step % settings.picture_every == 0:
                on_picture(place.step)
    _keep(folder, method.players, place, ranks)
    return Outcome(place.step, place.seconds, place.skipped)


@dataclass(frozen=True)
class _Place:
    """Where a run is: steps done, seconds spent over all its sittings, steps with an update skipped."""

    step: int = 0
    seconds: float = 0.0
    skipped: int = 0
    health: Health = field(default_factory=Health)

    def after(self, rows: Sequence[Mapping[str, Any]], seconds: float) -> "_Place":
        bad = any(row["skipped"] for row in rows)
        return _Place(self.step + 1, seconds, self.skipped + bad, self.health.after(rows))


def _step(
    method: Method, source: Source, step: int, progress: float, settings: LoopSettings, device: torch.device,
    ranks: Ranks,
) -> list[dict[str, Any]]:  # fmt: skip
    """One turn of each player that acts in this step; one row of metrics each, means over all processes and passes."""
    batch = source.batch(step)
    rows = []
    for player in method.players:
        if player.acts(step):
            parts = [Part(k, settings.accumulate) for k in range(settings.accumulate)]
            turns = [
                Turn.of(
                    settings.seed, step, settings.steps, player.name, device, progress,
                    ranks.part.within(part.index, part.count),
                ) for part in parts
            ]  # fmt: skip
            seen = ((part.of(batch), turn) for part, turn in zip(parts, turns, strict=True))
            row = _play(method, player, seen, progress, settings, ranks)
            rows.append({"step": step, "player": player.name, **row})
    return rows


def _play(
    method: Method, player: Player, passes: Iterable[tuple[Batch, Turn]], progress: float, settings: LoopSettings,
    ranks: Ranks,
) -> dict[str, float]:  # fmt: skip
    """Loss and update of one player. The others' weights ask for no gradient meanwhile, so none is left in them."""
    for other in method.players:
        other.gradients(other is player)
    player.forget()
    told: list[Metrics] = []
    for batch, turn in passes:
        turn.share_dropout()
        with torch.autocast(turn.rng.device.type, torch.bfloat16, enabled=settings.bf16):
            loss, metrics = method.loss(player.name, batch, turn)
        player.learn(loss / settings.accumulate if settings.accumulate > 1 else loss)
        told.append({"loss": float(loss.detach()), **metrics})
    means = ranks.mean([sum(each[name] for each in told) / len(told) for name in told[0]])
    found = dict(zip(told[0], means, strict=True))
    rate = player.rate(progress)
    norm = player.step(progress) if math.isfinite(found["loss"]) else math.nan
    player.forget()
    if math.isfinite(norm):
        for other in method.players:
            other.follow(player)
    for other in method.players:
        other.gradients(True)
    return {"loss": found.pop("loss"), "norm": norm, "lr": rate, "skipped": float(not math.isfinite(norm)), **found}


def _progress(place: _Place, settings: LoopSettings) -> float:
    """Share of the run that is done, by steps or by time, whichever is further."""
    share = place.step / settings.steps
    return share if settings.max_seconds is None else max(share, place.seconds / settings.max_seconds)


def _keep(folder: Path, players: Sequence[Player], place: _Place, ranks: Ranks) -> None:
    own_steps = {player.name: player.own_steps for player in players}
    state = {"step": place.step, "seconds": place.seconds, "skipped": place.skipped, "own_steps": own_steps}
    keep(folder, state, {player.name: player.tensors() for player in players}, ranks)
    if ranks.first:
        from ..pictures.plot import plot_losses

        plot_losses(folder / "metrics.jsonl", folder / "loss.png")


def _restore(folder: Path, players: Sequence[Player]) -> _Place:
    state, tensors = restore(folder)
    names = [player.name for player in players]
    if sorted(tensors) != sorted(names):
        raise CheckpointError(f"{folder} holds the players {sorted(tensors)}, this run has {sorted(names)}")
    for player in players:
        player.load(tensors[player.name], int(state["own_steps"][player.name]))
    return _Place(int(state["step"]), float(state["seconds"]), int(state["skipped"]))


def take_partners(players: Sequence[Player], folder: Path) -> None:
    """Put every player but the first, the student, where the run of `folder` left it, with averages and moments.

    Errors: `RecipeError` where that run had other players; `CheckpointError` where there is none, or its weights are
    of another shape.
    """
    state, found = restore(folder)
    for player in players[1:]:
        if player.name not in found:
            raise RecipeError(f"partners: {folder} trained {', '.join(found)}, and no {player.name}; leave it out")
        player.load(found[player.name], int(state["own_steps"][player.name]))


def _cut_metrics(path: Path, step: int) -> None:
    """Drop rows written after the checkpoint that a run resumes from."""
    if path.is_file():
        rows = [line for line in path.read_text().splitlines() if json.loads(line)["step"] < step]
        path.write_text("".join(row + "\n" for row in rows))
