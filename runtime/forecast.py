"""When a request will end: what becomes of a schedule that is left alone once others come and pass, and what is learnt.

Pure: seconds come in as numbers.
"""

import bisect
import math
from collections import deque

ARRIVALS = 64
"""Latest arrivals by which the near future is judged."""
FEWEST = 16
"""With fewer arrivals than this nothing is said of those to come."""
NEARLY = 0.9
"""Requests with this share of another's slack or more are too much like it to pass it for long."""
MISSES = 0.003
"""Share of promised deadlines that may be broken."""
CAUTION_STEP, MOST_CAUTION = 0.2, 4.0
DRIFT_STEP, LEAST_DRIFT, MOST_DRIFT = 0.02, 0.25, 4.0
KINDS_PER_OCTAVE = 2
"""Requests are alike whose slack differs by less than a factor of the root of two."""
MEMORY_S = 2.0
"""Call seconds over which the speed is averaged."""


class Forecast:
    """Learns from calls (`ran`) and arrivals (`arrived`); answers `ends_in`."""

    def __init__(self, speed: float = 1.0) -> None:
        self.speed = speed
        """How much work, as served alone, a second of calls does."""
        self.caution = 1.0
        self._drift: dict[int, float] = {}  # by kind: how much longer requests took of late than was predicted
        self._latest: deque[tuple[float, float, float]] = deque()  # (arrival, slack, cost), oldest first
        self._by_slack: list[tuple[float, float, float]] = []  # (slack, arrival, cost)

    def ran(self, alone_s: float, call_s: float) -> None:
        """A call of `call_s` did work that takes `alone_s` where nothing is shared."""
        if call_s > 0.0:
            share = call_s / (call_s + MEMORY_S)
            self.speed += share * (alone_s / call_s - self.speed)

    def kept(self, promise: bool) -> None:
        """A deadline was kept or broken: `caution`, by which predictions are stretched where a deadline is promised,
        rises at each that is broken and sinks a little at each kept, so that a share `MISSES` of them is broken."""
        step = -MISSES if promise else 1.0 - MISSES
        self.caution = min(MOST_CAUTION, max(1.0, self.caution + CAUTION_STEP * step))

    def ended(self, slack_s: float, late_s: float) -> None:
        """A request with this slack ended so much later than was predicted; below 0, earlier. What is predicted of its
        kind follows, so that as many end late as early: calls have costs that no table knows, and what passes a
        request delays it by less than its cost where they share calls."""
        factor = self.drift(slack_s) * (1.0 + (DRIFT_STEP if late_s > 0.0 else -DRIFT_STEP))
        self._drift[_kind(slack_s)] = min(MOST_DRIFT, max(LEAST_DRIFT, factor))

    def drift(self, slack_s: float) -> float:
        """How many times as long as `ends_in` says requests with this slack took of late."""
        return self._drift.get(_kind(slack_s), 1.0)

    def arrived(self, now_s: float, slack_s: float, cost_s: float) -> None:
        """A request came that costs `cost_s` and is due `slack_s` after its arrival."""
        if len(self._latest) == ARRIVALS:
            arrival, slack, cost = self._latest.popleft()
            del self._by_slack[bisect.bisect_left(self._by_slack, (slack, arrival, cost))]
        self._latest.append((now_s, slack_s, cost_s))
        bisect.insort(self._by_slack, (slack_s, now_s, cost_s))

    def ends_in(self, now_s: float, slack_s: float, undisturbed_s: float) -> float:
        """Seconds until a request ends that would take `undisturbed_s` if no other came.

        Requests go on arriving as they did of late; one with slack s passes this one if it comes within the next
        `slack_s - s` seconds, while this one is still here.
        """
        passers = self._passers(slack_s)
        if not passers or now_s <= self._latest[0][0]:
            return undisturbed_s
        seen_s = now_s - self._latest[0][0]
        return _with_passers(undisturbed_s, slack_s, passers, 1.0 / (seen_s * self.speed))

    def _passers(self, slack_s: float) -> list[tuple[float, float, float]]:
        """The latest arrivals that would pass a request with this slack, by rising slack."""
        if len(self._latest) < FEWEST:
            return []
        return self._by_slack[: bisect.bisect_left(self._by_slack, (NEARLY * slack_s,))]


def _kind(slack_s: float) -> int:
    return round(KINDS_PER_OCTAVE * math.log2(max(1e-6, slack_s)))


def _with_passers(base_s: float, slack_s: float, passers: list[tuple[float, float, float]], per_s: float) -> float:
    """The T for which T = base + sum of cost_j per_s min(T, slack - slack_j); passers by rising slack.

    Those of least slack may come for longest. Going from the shortest window up, each either closes before T or not.
    """
    rate = per_s * sum(cost for _, _, cost in passers)
    done = base_s
    for slack, _, cost in reversed(passers):
        window = slack_s - slack
        if rate < 1.0 and done / (1.0 - rate) <= window:
            return done / (1.0 - rate)
        rate -= cost * per_s
        done += cost * per_s * window
    return done
