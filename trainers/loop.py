"""The one training loop. It knows players and losses, and no method.

Order of one step: each player whose turn it is, in the method's order, sees the same batch and random draws of its own.
Batches and draws are functions of (seed, step), so a resumed run equals an unbroken one bit for bit.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from .checkpoint import load_checkpoint, save_checkpoint
from .errors import CheckpointError, TrainingDiverged
from .objective import Batch, Metrics, Turn
from .player import Player


class Method(Protocol):
    """Who trains, and each one's loss. Further networks it needs are its own business."""

    @property
    def players(self) -> Sequence[Player]: ...

    def loss(self, player: str, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]: ...


class Source(Protocol):
    """Batches as a pure function of the step."""

    def batch(self, step: int) -> Batch: ...


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """A run's length and habits. `max_seconds` ends it early and counts as progress, so the cooldown still happens."""

    steps: int
    seed: int = 0
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
    device: torch.device | str = "cpu", on_picture: Callable[[int], None] | None = None,
) -> Outcome:  # fmt: skip
    """Run to `settings.steps` or `settings.max_seconds`; leaves checkpoint.pt, metrics.jsonl and loss.png in `folder`.

    Errors: `TrainingDiverged` after `max_bad_steps` non-finite losses in a row; `CheckpointError` on a resume of
    something that is not there or has other players.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = _restore(folder / "checkpoint.pt", method.players) if resume else _Place()
    _cut_metrics(folder / "metrics.jsonl", place.step)
    started = time.monotonic() - place.seconds
    bar = tqdm(total=settings.steps, initial=place.step, desc=label, dynamic_ncols=True)
    with (folder / "metrics.jsonl").open("a") as log, bar:
        while (progress := _progress(place, settings)) < 1.0:
            rows = _step(method, source, place.step, progress, settings, torch.device(device))
            place = place.after(rows, time.monotonic() - started)
            for row in rows:
                log.write(json.dumps(row) + "\n")
            bar.set_postfix({f"{row['player']} loss": f"{row['loss']:.4g}" for row in rows}, refresh=False)
            bar.update()
            if place.bad_in_a_row >= settings.max_bad_steps:
                raise TrainingDiverged(
                    f"the loss was not finite for {place.bad_in_a_row} steps up to step {place.step}; "
                    f"lower lr, or look at {folder / 'metrics.jsonl'}"
                )
            if settings.checkpoint_every and place.step % settings.checkpoint_every == 0:
                log.flush()
                _keep(folder, method.players, place)
            if on_picture is not None and settings.picture_every and place.step % settings.picture_every == 0:
                on_picture(place.step)
    _keep(folder, method.players, place)
    return Outcome(place.step, place.seconds, place.skipped)


@dataclass(frozen=True)
class _Place:
    """Where a run is: steps done, seconds spent over all its sittings, steps with an update skipped."""

    step: int = 0
    seconds: float = 0.0
    skipped: int = 0
    bad_in_a_row: int = 0

    def after(self, rows: Sequence[Mapping[str, Any]], seconds: float) -> "_Place":
        bad = any(row["skipped"] for row in rows)
        return _Place(self.step + 1, seconds, self.skipped + bad, self.bad_in_a_row + 1 if bad else 0)


def _step(
    method: Method, source: Source, step: int, progress: float, settings: LoopSettings, device: torch.device
) -> list[dict[str, Any]]:
    """One turn of each player that acts in this step; one row of metrics each."""
    batch = source.batch(step)
    rows = []
    for player in method.players:
        if player.acts(step):
            turn = Turn.of(settings.seed, step, settings.steps, player.name, device, progress)
            row = _play(method, player, batch, turn, progress, settings)
            rows.append({"step": step, "player": player.name, **row})
    return rows


def _play(
    method: Method, player: Player, batch: Batch, turn: Turn, progress: float, settings: LoopSettings
) -> dict[str, float]:
    """Loss and update of one player. The others' weights ask for no gradient meanwhile, so none is left in them."""
    for other in method.players:
        other.gradients(other is player)
    turn.share_dropout()
    with torch.autocast(turn.rng.device.type, torch.bfloat16, enabled=settings.bf16):
        loss, metrics = method.loss(player.name, batch, turn)
    value = float(loss.detach())
    rate = player.rate(progress)
    norm = player.update(loss, progress) if math.isfinite(value) else math.nan
    if math.isfinite(norm):
        for other in method.players:
            other.follow(player)
    for other in method.players:
        other.gradients(True)
    return {"loss": value, "norm": norm, "lr": rate, "skipped": float(not math.isfinite(norm)), **metrics}


def _progress(place: _Place, settings: LoopSettings) -> float:
    """Share of the run that is done, by steps or by time, whichever is further."""
    share = place.step / settings.steps
    return share if settings.max_seconds is None else max(share, place.seconds / settings.max_seconds)


def _keep(folder: Path, players: Sequence[Player], place: _Place) -> None:
    state = {"step": place.step, "seconds": place.seconds, "skipped": place.skipped}
    save_checkpoint(folder / "checkpoint.pt", {**state, "players": {p.name: p.state() for p in players}})
    from .plot import plot_losses

    plot_losses(folder / "metrics.jsonl", folder / "loss.png")


def _restore(path: Path, players: Sequence[Player]) -> _Place:
    state = load_checkpoint(path)
    names = [player.name for player in players]
    if sorted(state["players"]) != sorted(names):
        raise CheckpointError(f"{path} holds the players {sorted(state['players'])}, this run has {sorted(names)}")
    for player in players:
        player.load(state["players"][player.name])
    return _Place(int(state["step"]), float(state["seconds"]), int(state["skipped"]))


def _cut_metrics(path: Path, step: int) -> None:
    """Drop rows written after the checkpoint that a run resumes from."""
    if path.is_file():
        rows = [line for line in path.read_text().splitlines() if json.loads(line)["step"] < step]
        path.write_text("".join(row + "\n" for row in rows))
