"""What traffic is sent: classes of requests, workloads of them, and the arrivals of one run.

Arrivals are a Poisson process fixed before the first request is sent, and latency counts from the planned arrival, so
a slow server cannot slow its own test down. The same seed gives every server the same requests at the same moments.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

MAX_REQUESTS = 20_000


@dataclass(frozen=True)
class Kind:
    """A class of requests: the steps, and which of the bundles (0 the student, 1 the teacher)."""

    steps: int
    bundle: int = 0

    @property
    def name(self) -> str:
        return f"{self.steps} step{'s' if self.steps > 1 else ''}{', teacher' if self.bundle else ''}"


@dataclass(frozen=True)
class Arrival:
    """One planned request: when it comes, in seconds from the start, what it asks for, and its number."""

    at_s: float
    kind: Kind
    number: int = 0


@dataclass(frozen=True)
class Workload:
    """mix: shares of the classes. load: arrivals per second as a fraction of the capacity for this mix.

    deadlines: requests carry one. weight: how long it runs beside the others.
    """

    name: str
    about: str
    mix: tuple[tuple[Kind, float], ...]
    load: float
    deadlines: bool = False
    weight: float = 1.0

    @property
    def kinds(self) -> list[Kind]:
        return [kind for kind, _ in self.mix]


_STUDENT = tuple((Kind(steps), 1.0) for steps in (1, 2, 4))
_TEACHER = (*((kind, 0.3) for kind, _ in _STUDENT), (Kind(25, bundle=1), 0.1))
MIXED = Workload("mixed", "1, 2 and 4 steps alike, at 0.9 of capacity", _STUDENT, 0.9, weight=1.5)
TEACHERS = Workload("teachers", "the same with 10 % teacher requests of 25 steps", _TEACHER, 0.9, weight=2.0)
STEADY = Workload("steady", "1, 2 and 4 steps at 0.9 of capacity, each with a deadline", _STUDENT, 0.9, deadlines=True)
OVERLOAD = Workload("overload", "1, 2 and 4 steps at 1.5 of capacity, each with a deadline", _STUDENT, 1.5, True)
UNIFORM = Workload("uniform", "all 1 step, at 0.9 of capacity: nothing to reorder", ((Kind(1), 1.0),), 0.9)
WORKLOADS = (MIXED, TEACHERS, STEADY, OVERLOAD, UNIFORM)


def plan_arrivals(
    rate_per_s: float, seconds: float, mix: Sequence[tuple[Kind, float]], seed: int, first: int = 0
) -> list[Arrival]:
    """A Poisson process of `rate_per_s` over `seconds`, classes drawn by their shares; numbered from `first`."""
    draw = random.Random(seed)
    kinds, shares = [kind for kind, _ in mix], [share for _, share in mix]
    arrivals: list[Arrival] = []
    at_s = draw.expovariate(rate_per_s)
    while at_s < seconds and len(arrivals) < MAX_REQUESTS:
        arrivals.append(Arrival(at_s, draw.choices(kinds, shares)[0], first + len(arrivals)))
        at_s += draw.expovariate(rate_per_s)
    return arrivals


def in_shares(mix: Sequence[tuple[Kind, float]], count: int) -> list[Kind]:
    """`count` classes, each as often as its share says, well spread: what capacity is measured with."""
    total = sum(share for _, share in mix)
    owed = {kind: 0.0 for kind, _ in mix}
    found = []
    for _ in range(count):
        for kind, share in mix:
            owed[kind] += share / total
        most = max(owed, key=lambda kind: owed[kind])
        owed[most] -= 1.0
        found.append(most)
    return found


@dataclass
class Numbers:
    """Numbers of requests, each handed out once, so that no prompt comes twice in a run."""

    used: int = 0

    def take(self, count: int) -> int:
        """The first of `count` numbers."""
        self.used += count
        return self.used - count


_SIZES, _SHAPES = ("small", "large", "tiny", "huge"), ("circle", "square", "triangle", "star", "ring")
_COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
_THINGS = [" ".join(words) for words in itertools.product(_SIZES, _COLOURS, _SHAPES)]
_RELATIONS = itertools.product(("above", "below", "beside"), ("a", "another"), _THINGS)
_PLACES = ["", *(" ".join(words) for words in _RELATIONS)]


def prompt(number: int) -> str:
    """The prompt of request `number`, one of 153,760 different ones, so that servers encode each anew."""
    place, thing = divmod(number, len(_THINGS))
    return f"a {_THINGS[thing]} {_PLACES[place % len(_PLACES)]}".rstrip()
