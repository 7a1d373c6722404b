"""The plain policy that load is compared with: whole requests in arrival order, those of equal shape in a batch.

It is what request batching servers do, kept for `fewstep bench load`: the head of the queue is served to its end, with
the requests behind it that ask for the same steps, as many as the same measured costs say that it pays. Nothing passes
anything, a call never mixes shapes, and a deadline is only looked at when it has passed. Same interface as `Scheduler`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .costs import Costs, best_batches
from .jobs import Accepted, Ended, Job, Lane, Rejected, Work
from .pricing import Pricing
from .scheduler import Change, Scheduler


def open_policy(name: str, lanes: Mapping[str, Lane], costs: Costs, max_queue: int) -> Scheduler:
    """The policy of a `RuntimeConfig`."""
    policy: type[Any] = FirstCome if name == "first-come" else Scheduler
    opened: Scheduler = policy(lanes, costs, max_queue=max_queue)
    return opened


class FirstCome:
    """Waiting requests, and the batch that runs, which a `Scheduler` of its own takes through its calls."""

    def __init__(self, lanes: Mapping[str, Lane], costs: Costs, *, max_queue: int) -> None:
        self._lanes = dict(lanes)
        self._pricing = Pricing(self._lanes, costs)
        self._max_queue = max_queue
        self._waiting: dict[str, Job] = {}  # in arrival order
        self._batch: dict[str, Job] = {}
        self._alone_s: dict[str, float] = {}  # what each of both costs where nothing is shared
        self._inside = Scheduler(lanes, costs, max_queue=max_queue, calls=0)

    @property
    def live(self) -> int:
        return len(self._waiting) + len(self._batch)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiting or request_id in self._batch

    @property
    def next_deadline_s(self) -> float | None:
        return min((job.deadline_s for job in self._jobs() if job.deadline_s is not None), default=None)

    def submit(self, job: Job, now_s: float) -> Accepted | Rejected:
        """Admit a request wherever there is room, whether or not it can be in time."""
        ahead, own = sum(self._alone_s.values()), self._pricing.job(job).total_s
        predicted = ahead + own
        if self.live >= self._max_queue:
            return Rejected("queue", ahead / 2, predicted)
        self._waiting[job.id], self._alone_s[job.id] = job, own
        return Accepted(now_s + predicted)

    def next(self, now_s: float | None = None) -> Work | None:
        """The next call of the batch that runs; where none does, the next batch begins."""
        if not self._batch and self._waiting:
            for job in self._next_batch():
                del self._waiting[job.id]
                self._batch[job.id] = job
                self._inside.submit(replace(job, deadline_s=None, priority=0), 0.0 if now_s is None else now_s)
        return self._inside.next(now_s)

    def complete(self, work: Work, errors: Sequence[object | None], now_s: float) -> list[Change]:
        return [self._seen(event, now_s) for event in self._inside.complete(work, errors, now_s)]

    def expire(self, now_s: float) -> list[Ended]:
        late = [job.id for job in self._jobs() if job.deadline_s is not None and job.deadline_s <= now_s]
        return [self._end(request_id, "expired") for request_id in late]

    def cancel(self, request_id: str) -> Ended | None:
        known = request_id in self._waiting or request_id in self._batch
        return self._end(request_id, "cancelled") if known else None

    def fail(self, request_ids: Iterable[str], error: object) -> list[Ended]:
        known = [i for i in request_ids if i in self._waiting or i in self._batch]
        return [replace(self._end(request_id, "failed"), error=error) for request_id in known]

    def close(self) -> list[Ended]:
        return [self._end(job.id, "closed") for job in self._jobs()]

    def extend(self, job: Job) -> None:
        self._batch[job.id] = job
        self._inside.extend(replace(job, deadline_s=None, priority=0))

    def conclude(self, request_id: str, now_s: float) -> Ended | None:
        ended = self._inside.conclude(request_id, now_s)
        return None if ended is None else self._ended(ended, now_s)

    def add(self, model: str, lane: Lane) -> None:
        self._lanes[model] = lane
        self._inside.add(model, lane)

    def drop(self, model: str) -> None:
        if self.users(model):
            raise ValueError(f"{len(self.users(model))} requests still need {model}")
        self._inside.drop(model)
        del self._lanes[model]

    def hold(self, model: str) -> None:
        self._inside.hold(model)

    def release(self, model: str) -> None:
        self._inside.release(model)

    def users(self, model: str) -> tuple[str, ...]:
        return tuple(job.id for job in self._jobs() if model in job.models)

    def waiting_due_s(self, model: str) -> float | None:
        return self._inside.waiting_due_s(model)

    def _jobs(self) -> list[Job]:
        return [*self._batch.values(), *self._waiting.values()]

    def _next_batch(self) -> list[Job]:
        """The head of the queue and as many of its shape as pays."""
        head = next(iter(self._waiting.values()))
        alike = [job for job in self._waiting.values() if _shape(job) == _shape(head)]
        most = max(1, self._lanes[head.model].max_batch // max([1, *(row.evaluations for row in head.rows)]))
        return alike[: best_batches(len(alike), most // head.pictures or 1, lambda k: self._batch_s(head, k)).size]

    def _batch_s(self, job: Job, count: int) -> float:
        """Seconds of `count` requests of one shape from the first call to the last."""
        pictures = count * job.pictures
        calls = [(part.model, part.role, part.size * count) for part in job.before]
        calls += [(row.model, row.role, row.evaluations * pictures) for row in job.rows]
        if job.finish is not None:
            calls.append((job.model, job.finish, pictures))
        return sum(self._pricing.call_s(*call) for call in calls)

    def _seen(self, event: Change, now_s: float) -> Change:
        return self._ended(event, now_s) if isinstance(event, Ended) else event

    def _ended(self, ended: Ended, now_s: float) -> Ended:
        """The end of a request of the batch; the scheduler inside knew nothing of its deadline."""
        del self._alone_s[ended.id]
        deadline_s = self._batch.pop(ended.id).deadline_s
        late = deadline_s is not None and deadline_s <= now_s and ended.reason == "finished"
        return Ended(ended.id, "expired") if late else ended

    def _end(self, request_id: str, reason: str) -> Ended:
        del self._alone_s[request_id]
        if self._waiting.pop(request_id, None) is None:
            del self._batch[request_id]
            self._inside.cancel(request_id)
        return Ended(request_id, reason)


def _shape(job: Job) -> tuple[object, ...]:
    """What must be equal for requests to share their calls from end to end."""
    return job.model, job.rows, job.finish, job.pictures, job.watch
