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
SHARING_MEMORY_S, PACE_MEMORY_S = 2.0, 0.5
"""Call seconds over which the averages go. A machine that others use too changes its pace within a second."""
OWN_STEP = 0.02
"""Share of a call in what is known of the pace of its kind."""
LONGEST = 4.0
"""A call counts as at most so many times what the table says: a machine that stood still says nothing of the next."""

Call = tuple[str, str]
"""(model, role as it is priced)."""
Kind = tuple[Call, bool]
"""A call, and whether it follows one like it."""


class Forecast:
    """Learns from calls (`begins`, `over`) and arrivals (`arrived`); answers `ends_in`.

    The cost table has medians of calls. A request's calls add up by their mean, and what the table does not know adds
    to it: what the machine does beside, and that a call takes longer after one of another network, whose weights and
    activations have the caches. `pace` has the first, of all calls together, and `_own_pace` the second, over it.
    """

    def __init__(self) -> None:
        self.pace = 1.0
        """Seconds that calls take, over what the table says."""
        self._shared = 1.0  # seconds of work, as served alone, per second of calls by the table
        self._own_pace: dict[Kind, float] = {}
        self._last: Call | None = None
        self._out: tuple[Kind, float, float, float] | None = None  # the call under way, and its begin
        self.caution = 1.0
        self._drift: dict[int, float] = {}  # by kind: how much longer requests took of late than was predicted
        self._latest: deque[tuple[float, float, float]] = deque()  # (arrival, slack, cost), oldest first
        self._by_slack: list[tuple[float, float, float]] = []  # (slack, arrival, cost)

    @property
    def speed(self) -> float:
        """How much work, as served alone by the table, a second does."""
        return self._shared / self.pace

    def begins(self, call: Call, alone_s: float, call_s: float, now_s: float) -> float:
        """A call that the table says takes `call_s` begins, with work that takes `alone_s` where nothing is shared.

        Returns the seconds that it will take.
        """
        kind = call, call == self._last
        self._last, self._out = call, (kind, alone_s, call_s, now_s)
        return self.pace * self._own_pace.get(kind, 1.0) * call_s

    def over(self, now_s: float) -> None:
        """The next call can begin, or nothing waits: what the last one caused until now was its own."""
        if self._out is None:
            return
        (kind, alone_s, call_s, begun_s), self._out = self._out, None
        if call_s > 0.0:
            found = min(LONGEST, (now_s - begun_s) / call_s)
            own = self._own_pace.get(kind, 1.0)
            self._own_pace[kind] = own + OWN_STEP * (found / self.pace - own)
            self.pace += call_s / (call_s + PACE_MEMORY_S) * (found - self.pace)
            self._shared += call_s / (call_s + SHARING_MEMORY_S) * (alone_s / call_s - self._shared)

    def copy(self) -> "Forecast":
        """What is known of calls, to run a schedule ahead."""
        other = Forecast()
        other.pace, other._shared = self.pace, self._shared
        other._own_pace, other._last = dict(self._own_pace), self._last
        return other

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
