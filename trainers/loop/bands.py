"""Expected bands of a recipe's losses and metrics over a run, and what it usually means to be outside of them.

    python -m fewstep.trainers.loop.bands NAME METRICS.jsonl...

makes `evidence_files/bands/NAME.json` from the metrics of several seeds. A band is where means of `WINDOW` rows lay in
each tenth of those runs, and half as much again on both sides; other data and batches move losses that far.
"""

import argparse
import json
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..evidence import FOLDER

TENTHS, WINDOW = 10, 10
PLAIN = ("step", "player", "lr", "skipped")
"""Of a row of metrics, what is no metric."""
SHARES = ("fake.critic_right", "critic.critic_right")
"""Metrics from 0 to 1."""
Band = tuple[float, float]

LAGS = ("the fake score lags behind the student: raise its lr, or let the student act less often", None)
UNDECIDED = ("the critic learns nothing: raise its weight or lr", "the critic has won: lower its weight")
FOOLED = (
    "the critic has won, and its gradient says little: lower its weight, or noise what it judges more",
    "the critic is fooled more often than not: it is too weak, or its labels are swapped",
)
LEFT = "states on the way hold other noise than was drawn: check the path, or widen the margin"
APART = ("student and teacher drift apart: lower the student's lr", "the scores agree: collapse?")

MEANINGS = {
    "student.loss": ("the student is worse than usual: lower lr, or check that data and teacher fit", None),
    "student.residual": ("landings disagree more than usual: lower lr, or a guidance range that is too wide", None),
    "student.norm": ("gradients are large: lower lr, or a smaller clip_norm", "gradients vanish: is anything trained?"),
    "student.dmd_gradient": APART,
    "student.gap": APART,
    "student.score_identity": (None, None),  # its value says nothing of progress
    "student.gan_student": ("the critic sees through the student: lower its lr or weight", "the critic is fooled"),
    "fake.loss": LAGS,
    "fake.denoising": LAGS,
    "fake.importance": (LEFT, LEFT),
    "fake.norm": ("the fake score's gradients are large: lower its lr", "the fake score no longer learns"),
    "fake.gan_critic": UNDECIDED,
    "fake.critic_right": FOOLED,
    "critic.loss": UNDECIDED,
    "critic.gan_critic": UNDECIDED,
    "critic.critic_right": FOOLED,
    "critic.critic_slope": ("the critic grows steep: raise its regulariser, or lower its lr", None),
    "critic.norm": ("the critic's gradients are large: lower its lr", "the critic no longer learns"),
}
"""Player and metric -> (what it usually means to be above the band, below it); None: that is no trouble."""
UNKNOWN = "this is not how the recipe usually trains"


@dataclass
class Watch:
    """Compares a run with its recipe's bands, and says once per metric when it leaves them.

    bands: "player.metric" -> a band for each tenth of the run. outside: what was said, by metric.
    """

    bands: Mapping[str, Sequence[Band]]
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr)
    outside: dict[str, str] = field(default_factory=dict)
    _recent: dict[str, deque[float]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=WINDOW)))

    def see(self, row: Mapping[str, Any], progress: float) -> None:
        for name, value in _metrics(row):
            recent = self._recent[name]
            recent.append(value)
            if name not in self.bands or name in self.outside or len(recent) < WINDOW:
                continue
            low, high = self.bands[name][min(TENTHS - 1, int(progress * TENTHS))]
            mean = sum(recent) / WINDOW
            side = 0 if mean > high else 1
            meaning = MEANINGS.get(name, (UNKNOWN, UNKNOWN))[side]
            if low <= mean <= high or meaning is None:
                continue
            text = f"step {row['step']}: {name} is {mean:.3g}, expected {low:.3g} to {high:.3g}: {meaning}"
            self.outside[name] = text
            self.say(text)


def bands_of(recipe: str) -> Mapping[str, Sequence[Band]]:
    """The bands that ship with a recipe; none for most."""
    file = FOLDER / "bands" / f"{recipe}.json"
    if not file.is_file():
        return {}
    return {name: [(low, high) for low, high in rows] for name, rows in json.loads(file.read_text())["bands"].items()}


def make_bands(files: Sequence[Path]) -> dict[str, list[Band]]:
    """Bands of several runs' metrics. A tenth that no whole window ends in has that of its nearest neighbour.

    Errors: `DataError` for fewer than two runs, or a file that is no metrics.
    """
    if len(files) < 2:
        raise DataError(f"{len(files)} runs make no band; give the metrics of two seeds or more")
    seen: dict[str, list[list[float]]] = defaultdict(lambda: [[] for _ in range(TENTHS)])
    for file in files:
        try:
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            total = rows[-1]["step"] + 1
            recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))
            for row in rows:
                for name, value in _metrics(row):
                    recent[name].append(value)
                    if len(recent[name]) == WINDOW:
                        seen[name][row["step"] * TENTHS // total].append(sum(recent[name]) / WINDOW)
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise DataError(f"{file} holds no metrics of a run ({error})") from error
    bands = {}
    for name, tenths in sorted(seen.items()):
        filled = [k for k, found in enumerate(tenths) if found]
        near = [min(filled, key=lambda other, k=k: abs(other - k)) for k in range(TENTHS)]  # type: ignore[misc]
        bands[name] = [_widened(tenths[k], name in SHARES) for k in near]
    return bands


def _widened(found: Sequence[float], share: bool) -> Band:
    """Half as much again; of a share, half of the way to 0 and to 1."""
    low, high = min(found), max(found)
    margin = 0.5 * (high - low) + 0.5 * max(abs(low), abs(high))
    above = 0.5 * (high + 1.0) if share else high + margin
    below = 0.5 * low if low >= 0.0 else low - margin
    return float(f"{below:.4g}"), float(f"{above:.4g}")


def _metrics(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """("player.metric", value) of what is finite."""
    for name, value in row.items():
        if name not in PLAIN and abs(value) < float("inf"):
            yield f"{row['player']}.{name}", float(value)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fewstep.trainers.loop.bands", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("metrics", nargs="+", type=Path, help="metrics.jsonl of several seeds' runs")
    parser.add_argument("--out", type=Path, help="the file (default: the one that ships with the recipe)")
    args = parser.parse_args(argv)
    out = args.out or FOLDER / "bands" / f"{args.recipe}.json"
    found = {"recipe": args.recipe, "runs": len(args.metrics), "bands": make_bands(args.metrics)}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found).replace("]], ", "]],\n") + "\n")
    print(f"wrote {out}: {', '.join(found['bands'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
