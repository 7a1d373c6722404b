"""What engine calls cost, measured, and the batch size that follows from it. Pure: seconds come in as numbers."""

import math
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

Key = tuple[str, str]
"""(model, engine role)."""

GUESS_S = 0.01
_KEPT = 9
CONSIDERED = 64
"""Candidates looked at for one call."""


class Costs:
    """Seconds per call by role and batch size: the median of the latest measurements of that size.

    Between measured sizes the cost is interpolated; beyond the largest it grows in proportion, so an unmeasured batch
    never looks cheaper than what is known.

    saved: seconds by which a role that does a whole request ends before the calls that it replaces, where measured.
    """

    def __init__(self) -> None:
        self._kept: dict[Key, dict[int, deque[float]]] = {}
        self._medians: dict[Key, list[tuple[int, float]]] = {}
        self._answers: dict[Key, dict[int, float]] = {}
        self.saved: dict[Key, float] = {}

    def record(self, key: Key, size: int, seconds: float) -> None:
        sizes = self._kept.setdefault(key, {})
        sizes.setdefault(size, deque(maxlen=_KEPT)).append(seconds)
        known = dict(self._medians.get(key, ()))
        known[size] = median(sizes[size])
        self._medians[key] = sorted(known.items())
        self._answers.pop(key, None)

    def forget(self, model: str) -> None:
        """Drop all that is known of a model's calls."""
        for table in (self._kept, self._medians, self._answers, self.saved):
            for key in [key for key in table if key[0] == model]:
                del table[key]

    def table(self) -> dict[Key, list[tuple[int, float]]]:
        """What is known: (size, seconds) by rising size."""
        return {key: list(known) for key, known in self._medians.items()}

    def measured(self, key: Key) -> bool:
        return key in self._medians

    def seconds(self, key: Key, size: int) -> float:
        """Expected seconds of one call of `size`; `GUESS_S` each where nothing was measured."""
        answers = self._answers.setdefault(key, {})
        found = answers.get(size)
        if found is None:
            found = answers[size] = self._seconds(key, size)
        return found

    def _seconds(self, key: Key, size: int) -> float:
        known = self._medians.get(key)
        if not known:
            return GUESS_S * size
        below = [(n, s) for n, s in known if n <= size]
        above = [(n, s) for n, s in known if n >= size]
        if not below:
            return above[0][1]
        n0, s0 = below[-1]
        if not above:
            return s0 * size / n0
        n1, s1 = above[0]
        return s0 if n1 == n0 else s0 + (s1 - s0) * (size - n0) / (n1 - n0)


class Batches(NamedTuple):
    """Serving some items in batches of `size`: the sum of the items' finish times, and when the last ends."""

    size: int
    total_s: float
    span_s: float


def best_batches(ready: int, most: int, cost: Callable[[int], float]) -> Batches:
    """How many of `ready` items to put into the next call so that the items' mean finish time is least.

    Serving in batches of k, batch j ends after j calls. At equal means the smaller batch wins, so nothing is batched
    unless the cost table says that it pays. `cost(k)` is the seconds of one call on the first k items.
    """
    ready = min(ready, CONSIDERED)
    if ready == 1 or most == 1:
        one = cost(1)
        return Batches(1, one * ready * (ready + 1) / 2, one * ready)
    best = Batches(1, math.inf, math.inf)
    seconds = [0.0]
    for k in range(1, min(ready, most) + 1):
        whole, rest = divmod(ready, k)
        seconds.append(cost(k))
        each, last = seconds[k], seconds[rest]
        total = k * each * whole * (whole + 1) / 2 + rest * (whole * each + last)
        if total < best.total_s * (1 - 1e-9):
            best = Batches(k, total, whole * each + last)
    return best
