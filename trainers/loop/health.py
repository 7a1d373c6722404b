"""When a run has gone wrong for good: what is said of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import TrainingDiverged
from .checkpoint import has_checkpoint

EXPLODED = 1e4
"""Times the usual size of a player's loss."""
KNOWN_AFTER = 50
"""Turns of a player after which the usual size of its loss is known."""


@dataclass(frozen=True)
class Health:
    """Bad steps in a row, the first row of metrics among them, and per player how large its loss is and since when.

    harmless: whether no bad step changed a weight, so that they are as good as before.
    """

    bad: int = 0
    harmless: bool = True
    first: Mapping[str, Any] | None = None
    usual: Mapping[str, tuple[float, int]] = field(default_factory=dict)

    def after(self, rows: Sequence[Mapping[str, Any]]) -> "Health":
        """A step is bad where an update was skipped, or a loss is `EXPLODED` times what it has been."""
        wrong = next((row for row in rows if row["skipped"] or self.exploded(row)), None)
        if wrong is not None:
            harmless = self.harmless and all(row["skipped"] or not self.exploded(row) for row in rows)
            return Health(self.bad + 1, harmless, self.first or wrong, self.usual)
        usual = dict(self.usual)
        for row in rows:
            if row["loss"] == 0.0:  # nothing was asked of it yet, which says nothing of its usual loss
                continue
            size, count = usual.get(row["player"], (0.0, 0))
            usual[row["player"]] = (size + (abs(row["loss"]) - size) / min(count + 1, 500), count + 1)
        return Health(usual=usual)

    def exploded(self, row: Mapping[str, Any]) -> bool:
        size, count = self.usual.get(row["player"], (0.0, 0))
        return count >= KNOWN_AFTER and size > 0.0 and abs(row["loss"]) > EXPLODED * size


def diverged(health: Health, step: int, folder: Path, bf16: bool) -> TrainingDiverged:
    """The steps, the player and the term at fault, where the weights from before are, and what may help."""
    row = health.first
    assert row is not None  # asked for after a bad step
    told = {name: value for name, value in row.items() if name not in ("step", "player", "lr", "skipped")}
    wrong = [name for name, value in told.items() if not math.isfinite(value)]
    terms = [name for name in wrong if name not in ("loss", "norm")] or wrong
    if not wrong:
        term, what = f"{row['player']} loss", f"{row['loss']:.3g}, usually {health.usual[row['player']][0]:.3g}"
    elif terms == ["norm"]:
        term, what = f"gradient of the {row['player']} loss", f"not finite, the loss itself {row['loss']:.3g}"
    else:
        term, what = f"{row['player']} {' and '.join(terms)}", "not finite"
    kept = f"The last good checkpoint is in {folder}" if has_checkpoint(folder) else "No checkpoint was kept yet"
    halves = ", --set bf16=false" if bf16 else ""
    return TrainingDiverged(
        f"{health.bad} bad steps in a row up to step {step}, first at step {row['step']}: {term} ({what}). {kept}. "
        f"Try a lower lr (it was {row['lr']:.2g}){halves}, or look at {folder / 'metrics.jsonl'} before that step"
    )
