"""Traffic through a scheduling policy on a simulated clock: the policy is real, engine calls take what a table says.

A thousand requests take milliseconds, and the same ones always end the same, so claims about order are tests.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from .jobs import Accepted, Ended, Job, Paused, Rejected, Stepped, Work


class Policy(Protocol):
    """What a `Scheduler` and a `FirstCome` are here."""

    def submit(self, job: Job, now_s: float) -> Accepted | Rejected: ...
    def next(self, now_s: float | None = None) -> Work | None: ...
    def complete(self, work: Work, errors: Sequence[object | None], now_s: float) -> list[Stepped | Paused | Ended]: ...
    def expire(self, now_s: float) -> list[Ended]: ...


@dataclass(frozen=True)
class Passage:
    """One request through the simulation. reason: as in `Ended`, or "rejected"; times in seconds from the start.

    predicted_s: when it was said to end, None where it was refused.
    """

    job: Job
    at_s: float
    end_s: float
    reason: str
    predicted_s: float | None


def simulate(policy: Policy, arrivals: Sequence[tuple[float, Job]], call_s: Callable[[Work], float]) -> list[Passage]:
    """Serve every arrival (seconds, job) with one engine, in the order of the arrivals' times.

    call_s: what an engine call takes. Jobs with `then_s` are not for here.
    """
    passages: dict[str, Passage] = {}
    admitted: dict[str, tuple[float, Job, float]] = {}

    def end(events: Sequence[object], now_s: float) -> None:
        for event in events:
            if isinstance(event, Ended):
                at_s, job, predicted_s = admitted.pop(event.id)
                passages[event.id] = Passage(job, at_s, now_s, event.reason, predicted_s)

    now_s, coming = 0.0, iter(sorted(arrivals, key=lambda arrival: arrival[0]))
    upcoming = next(coming, None)
    while upcoming is not None or admitted:
        work = policy.next(now_s)
        if work is None and upcoming is None:
            raise ValueError(f"requests {sorted(admitted)[:3]} wait, and the policy has nothing to do")
        until_s = now_s + call_s(work) if work is not None else max(now_s, upcoming[0] if upcoming else now_s)
        while upcoming is not None and upcoming[0] <= until_s:
            at_s, job = upcoming
            decision = policy.submit(job, at_s)
            if isinstance(decision, Accepted):
                admitted[job.id] = at_s, job, decision.finish_s
            else:
                passages[job.id] = Passage(job, at_s, at_s, "rejected", None)
            upcoming = next(coming, None)
        now_s = until_s
        if work is not None:
            end(policy.complete(work, [None] * len(work.items), now_s), now_s)
        end(policy.expire(now_s), now_s)
    return [passages[job.id] for _, job in arrivals]
