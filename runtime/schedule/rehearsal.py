"""A schedule run ahead of time, on a copy of the scheduler: when would a request end if no other came? Pure."""

from typing import TYPE_CHECKING

from .jobs import Ended, Job, Paused

if TYPE_CHECKING:
    from .scheduler import Scheduler


def rehearse(ahead: "Scheduler", job: Job, now_s: float, calls: int) -> float:
    """Seconds from `now_s` until `job`, which has just entered `ahead`, would end; calls take what the table says.

    ahead: it is run on, and of no use afterwards. calls: after so many, and where nothing can run, the rest is what is
    left of this request and of those due before it.
    """
    time_s = now_s
    for end_s, work in ahead.running:
        time_s = max(time_s, end_s)
        ahead.complete(work, [None] * len(work.items), time_s)
    for _ in range(calls):
        if ahead.next(time_s) is None:
            break
        ((time_s, work),) = ahead.running
        for event in ahead.complete(work, [None] * len(work.items), time_s):
            if isinstance(event, Ended | Paused) and event.id == job.id:
                return time_s - now_s + (job.then_s or 0.0)
    return time_s - now_s + ahead.left_s(job.id)
