"""Which work an engine does next. A state machine: events and `now_s` in, decisions out; no torch, clock, lock or log.

A request is preparations, then rows, then decodes (`runtime.schedule.jobs`). Each waits in the queue of the model and
role that does it, whichever request it is of, and shares a call with what waits there where the measured costs say that
it pays.

Order. Every request has one due time, fixed when it is accepted: `arrival + STRETCH * own cost / 2^priority`; where it
has a deadline, with DEADLINE_STRETCH, or the deadline less its own cost where that is sooner. The earliest due goes
first, and a running request yields to it at its next step. So short requests pass long ones, urgent ones pass both, and
none waits for ever, since later arrivals have later due times.
"""

import bisect
import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from .costs import Costs
from .forecast import Forecast
from .jobs import DECODE, DENOISE, KINDS, Accepted, Ended, Item, Job, Lane, Paused, Rejected, Stepped, Work, mixed
from .pricing import Price, Pricing
from .rehearsal import rehearse
from .sharing import Entry, Key, share

STRETCH, DEADLINE_STRETCH = 20.0, 2.0
"""A request's waiting time is in proportion when it takes this many times its own cost. With 10 for those without a
deadline, long ones in a burst come due ahead of short ones (`tests/test_load_claims.py`). Those with one were told when
they end, so few may pass: with 10 predictions were a third farther off, with 1 fewer end in time at overload."""

CALLS, REQUESTS = 16, 32
"""How far the schedule is run ahead to keep a deadline: so many calls, and only where no more requests are here."""
CLEARLY = 0.2
"""What is in front being too late by this share alone, nothing is run ahead: refusals must be cheap at overload."""

Change = Stepped | Paused | Ended


@dataclass(slots=True)
class _Live:
    """`left_s`: what is still to do costs alone. `preparing`, `pictures`: counts of those not done. queued: (rank,
    number) of what waits -> its queue. foreseen: its slack, and when it was predicted to end."""

    job: Job
    price: Price
    due_s: float
    arrival: int
    left_s: float
    preparing: int
    pictures: int
    models: frozenset[str]
    queued: dict[tuple[int, int], Key] = field(default_factory=dict)
    foreseen: tuple[float, float] = (0.0, 0.0)

    def copy(self) -> "_Live":
        return replace(self, queued=dict(self.queued))


class Scheduler:
    """`costs` is read here and filled by whoever measures.

    calls: how many calls are run ahead to predict when a request with a deadline ends, which costs a tenth of a small
    network's call; those to whom nothing is promised are told what follows from the work in front of them.
    """

    def __init__(self, lanes: Mapping[str, Lane], costs: Costs, *, max_queue: int, calls: int = CALLS) -> None:
        self._lanes = dict(lanes)
        self._pricing = Pricing(self._lanes, costs)
        self._max_queue = max_queue
        self._calls = calls
        self._live: dict[str, _Live] = {}
        self._order: list[tuple[float, int, str]] = []  # (due, arrival number, id), earliest first
        self._left: list[float] = []  # what each of `_order` still costs
        self._deadlines: list[tuple[float, str]] = []
        self._queues: dict[Key, list[Entry]] = {}
        self._running: dict[int, tuple[float, Work, Sequence[Entry]]] = {}  # (predicted end, the call, its items) by id
        self._held: set[str] = set()
        self._users: Counter[str] = Counter()
        self._arrivals = 0
        self.forecast = Forecast()

    @property
    def live(self) -> int:
        """Accepted requests that have not ended."""
        return len(self._live)

    def __contains__(self, request_id: str) -> bool:
        """Whether a request is here: accepted, and not ended."""
        return request_id in self._live

    @property
    def next_deadline_s(self) -> float | None:
        """When `expire` has something to do next."""
        return self._deadlines[0][0] if self._deadlines else None

    def add(self, model: str, lane: Lane) -> None:
        """Serve one more model, or the same one by another engine."""
        self._lanes[model] = lane

    def drop(self, model: str) -> None:
        """Serve a model no longer; no request that visits it may be here."""
        if self._users[model]:
            raise ValueError(f"{self._users[model]} requests still need {model}")
        self._held.discard(model)
        del self._lanes[model], self._users[model]

    def hold(self, model: str) -> None:
        """Give out none of a model's work until `release`; it waits, and is admitted as before."""
        self._held.add(model)

    def release(self, model: str) -> None:
        self._held.discard(model)

    def users(self, model: str) -> tuple[str, ...]:
        """The requests that visit a model."""
        return tuple(request_id for request_id, live in self._live.items() if model in live.models)

    def waiting_due_s(self, model: str) -> float | None:
        """The earliest due time of what waits for a model, None where nothing does."""
        return min((queue[0].due_s for key, queue in self._queues.items() if key[0] == model), default=None)

    def submit(self, job: Job, now_s: float) -> Accepted | Rejected:
        """Admit a request, or say when to come back. Ids must be new."""
        if job.id in self._live:
            raise ValueError(f"request {job.id} is already here")
        price = self._pricing.job(_with_work(job))
        own = price.total_s
        stretch = STRETCH if job.deadline_s is None else DEADLINE_STRETCH
        soft = now_s + stretch * own * 2.0 ** -max(-8, min(8, job.priority))
        due = soft if job.deadline_s is None else min(soft, job.deadline_s - own)
        place = bisect.bisect_left(self._order, (due, self._arrivals))
        ahead = sum(self._left[:place])
        undisturbed = self._undisturbed_s(job, price, due, place, ahead, now_s)
        passed = self.forecast.ends_in(now_s, due - now_s, undisturbed)
        predicted = passed * self.forecast.drift(due - now_s)
        if len(self._live) >= self._max_queue:
            return Rejected("queue", sum(self._left) / 2 / self.forecast.speed, predicted)  # every caller comes back
        if job.deadline_s is not None and self._pricing.measured(job):
            if now_s + own > job.deadline_s:
                return Rejected("hopeless", 0.0, own)
            promised = max(passed, predicted) * self.forecast.caution  # a promise does not count on luck
            if now_s + promised > job.deadline_s or self._harms(place, own, now_s):
                return Rejected("deadline", max(ahead, own) / self.forecast.speed, predicted)
        self.forecast.arrived(now_s, due - now_s, own)
        self._enter(job, price, due, place)
        self._live[job.id].foreseen = due - now_s, now_s + predicted
        return Accepted(now_s + predicted)

    def cancel(self, request_id: str) -> Ended | None:
        """End a request now; what runs of it is forgotten when it returns. None where it is not here (any more)."""
        return self._end(request_id, "cancelled") if request_id in self._live else None

    def fail(self, request_ids: Iterable[str], error: object) -> list[Ended]:
        """End those requests that are here."""
        return [self._end(request_id, "failed", error) for request_id in request_ids if request_id in self._live]

    def expire(self, now_s: float) -> list[Ended]:
        """End every request whose deadline has passed."""
        ends = []
        while self._deadlines and self._deadlines[0][0] <= now_s:
            ends.append(self._finish(self._live[self._deadlines[0][1]], now_s))
        return ends

    def close(self) -> list[Ended]:
        """End everything."""
        return [self._end(request_id, "closed") for request_id in list(self._live)]

    def extend(self, job: Job) -> None:
        """More work for a paused request, in its old place; its id, priority and deadline stay as they were."""
        live = self._live[job.id]
        self._users.subtract(live.models)
        live.job, live.price, live.models = job, self._pricing.job(_with_work(job)), job.models
        self._users.update(live.models)
        live.preparing, live.pictures = len(job.before), job.pictures
        self._spend(live, live.left_s - live.price.total_s)
        self._begin(live)

    def conclude(self, request_id: str, now_s: float) -> Ended | None:
        """End a paused request, with nothing more to do. None where it is not here any more."""
        live = self._live.get(request_id)
        return None if live is None else self._finish(live, now_s)

    def next(self, now_s: float | None = None) -> Work | None:
        """The next engine call, its items marked as running; None where nothing is ready.

        now_s: by which predictions know how much of this call is done, and learn what calls take.
        """
        if now_s is not None and not self._running:
            self.forecast.over(now_s)
        wanted, first = None, None
        for key, queue in self._queues.items():
            if (first is None or queue[0] < first) and key[0] not in self._held:
                wanted, first = key, queue[0]
        return None if wanted is None else self._take(*share(self._queues, wanted, self._pricing), now_s)

    def complete(self, work: Work, errors: Sequence[object | None], now_s: float) -> list[Change]:
        """Take back a call: one error (or None) per item, in order. Items of requests that have ended are dropped."""
        self._running.pop(id(work), None)
        events: list[Change] = []
        for item, error in zip(work.items, errors, strict=True):
            live = self._live.get(item.id)
            if live is None:
                continue
            if error is not None:
                events.append(self._end(item.id, "failed", error))
                continue
            events += self._progress(live, item, work.kind)
            if live.preparing or live.pictures:
                continue
            if live.job.then_s is not None:
                events.append(Paused(item.id))
            else:
                events.append(self._finish(live, now_s))
        if not self._queues:
            self.forecast.over(now_s)
        return events

    def _progress(self, live: _Live, item: Item, kind: str) -> list[Change]:
        if kind == DECODE:
            live.pictures -= 1
            self._spend(live, live.price.finish_s)
            return []
        if kind != DENOISE:
            live.preparing -= 1
            self._spend(live, live.price.before_s[item.step])
            if not live.preparing:
                self._begin_rows(live)
            return []
        self._spend(live, live.price.row_s[item.step])
        self._queue_row(live, item.picture, item.step + 1)
        return [Stepped(item.id, item.picture, item.step + 1)]

    def _enter(self, job: Job, price: Price, due_s: float, place: int) -> None:
        own, models = price.total_s, job.models
        live = _Live(job, price, due_s, self._arrivals, own, len(job.before), job.pictures, models)
        self._arrivals += 1
        self._live[job.id] = live
        self._order.insert(place, (due_s, live.arrival, job.id))
        self._left.insert(place, own)
        if job.deadline_s is not None:
            bisect.insort(self._deadlines, (job.deadline_s, job.id))
        for model in models:
            self._users[model] += 1
        self._begin(live)

    def _begin(self, live: _Live) -> None:
        """Queue what a job begins with."""
        for k, part in enumerate(live.job.before):
            self._push(
                live, (part.model, part.kind, part.role), 1, Item(live.job.id, 0, k), part.size, live.price.before_s[k]
            )
        if not live.preparing:
            self._begin_rows(live)

    def _begin_rows(self, live: _Live) -> None:
        for picture in range(live.pictures):
            self._queue_row(live, picture, 0)

    def _queue_row(self, live: _Live, picture: int, step: int) -> None:
        """Queue that row of a picture, or its decode where `step` rows are all."""
        job = live.job
        item = Item(job.id, picture, step)
        if step < len(job.rows):
            row = job.rows[step]
            self._push(live, (row.model, DENOISE, row.role), 1, item, row.evaluations, live.price.row_s[step])
        elif job.finish is None:
            live.pictures -= 1
        else:
            self._push(live, (job.model, DECODE, job.finish), 0, item, 1, live.price.finish_s)

    def _push(self, live: _Live, key: Key, rank: int, item: Item, size: int, alone_s: float) -> None:
        number = item.step if key[1] in KINDS[:2] else item.picture
        entry = Entry(live.due_s, live.arrival, rank, number, item, size, alone_s)
        bisect.insort(self._queues.setdefault(key, []), entry)
        live.queued[rank, number] = key

    def _remove(self, live: _Live, rank: int, number: int) -> None:
        key = live.queued.pop((rank, number))
        queue = self._queues[key]
        del queue[bisect.bisect_left(queue, (live.due_s, live.arrival, rank, number))]
        if not queue:
            del self._queues[key]

    def _take(self, key: Key, entries: Sequence[Entry], mixes: bool, now_s: float | None) -> Work:
        model, kind, role = key
        size, alone_s = 0, 0.0
        for entry in entries:
            self._remove(self._live[entry.item.id], entry.rank, entry.number)
            size += entry.size
            alone_s += entry.alone_s
        priced = mixed(role) if mixes else role
        call_s = alone_s if len(entries) == 1 else self._pricing.call_s(model, priced, size)
        work = Work(kind, model, role, tuple([entry.item for entry in entries]), size, priced)
        if now_s is not None:
            took_s = self.forecast.begins((model, priced), alone_s, call_s, now_s)
            self._running[id(work)] = now_s + took_s, work, entries
        return work

    def _undisturbed_s(self, job: Job, price: Price, due_s: float, place: int, ahead_s: float, now_s: float) -> float:
        """Seconds until a request would end that enters now, if no other came; with a deadline, by the schedule itself.
        ahead_s: what all that is due before it still costs."""
        alone_s = self.forecast.pace * price.total_s
        if not self._live:
            return alone_s
        running_s, counted_s = self._running_s(due_s, now_s)
        by_order_s = running_s + max(alone_s, (ahead_s - counted_s + price.total_s) / self.forecast.speed)
        late = job.deadline_s is not None and now_s + (1.0 - CLEARLY) * by_order_s > job.deadline_s
        if job.deadline_s is None or late or not self._calls or len(self._live) >= REQUESTS:
            return by_order_s
        ahead = self.copy()
        ahead._enter(job, price, due_s, place)
        return rehearse(ahead, job, now_s, self._calls)

    def _running_s(self, due_s: float, now_s: float) -> tuple[float, float]:
        """(seconds until the calls that run are done, what they do of requests due before `due_s`, each alone)."""
        until, counted = 0.0, 0.0
        for end_s, _, entries in self._running.values():
            until = max(until, end_s - now_s)
            counted += sum([entry.alone_s for entry in entries if entry.due_s <= due_s and entry.item.id in self._live])
        return until, counted

    def copy(self) -> "Scheduler":
        """A scheduler in the same state with requests of its own, to be run ahead. What it learns is its own."""
        other = copy.copy(self)
        other.forecast = self.forecast.copy()
        other._live = {request_id: live.copy() for request_id, live in self._live.items()}
        other._queues = {key: list(queue) for key, queue in self._queues.items()}
        other._order, other._left, other._running = list(self._order), list(self._left), dict(self._running)
        other._users, other._deadlines = Counter(self._users), list(self._deadlines)
        return other

    @property
    def running(self) -> list[tuple[float, Work]]:
        """The calls that are out, with their predicted ends in seconds."""
        return [(end_s, work) for end_s, work, _ in self._running.values()]

    def left_s(self, request_id: str) -> float:
        """Seconds that a request and all that is due before it still take, at the pace of late."""
        live = self._live[request_id]
        place = bisect.bisect_left(self._order, (live.due_s, live.arrival))
        return max(self.forecast.pace * live.left_s, sum(self._left[: place + 1]) / self.forecast.speed)

    def _end(self, request_id: str, reason: str, error: object = None) -> Ended:
        live = self._live.pop(request_id)
        for rank, number in tuple(live.queued):
            self._remove(live, rank, number)
        place = bisect.bisect_left(self._order, (live.due_s, live.arrival))
        del self._order[place], self._left[place]
        if live.job.deadline_s is not None:
            del self._deadlines[bisect.bisect_left(self._deadlines, (live.job.deadline_s, request_id))]
        for model in live.models:
            self._users[model] -= 1
        return Ended(request_id, reason, error)

    def _finish(self, live: _Live, now_s: float) -> Ended:
        deadline, (slack_s, finish_s) = live.job.deadline_s, live.foreseen
        late = deadline is not None and deadline <= now_s
        self.forecast.ended(slack_s, now_s - finish_s)
        if deadline is not None:
            self.forecast.kept(not late)
        return self._end(live.job.id, "expired" if late else "finished")

    def _spend(self, live: _Live, seconds: float) -> None:
        """So much less is left of a request's work."""
        live.left_s = max(0.0, live.left_s - seconds)
        self._left[bisect.bisect_left(self._order, (live.due_s, live.arrival))] = live.left_s

    def _harms(self, place: int, own_s: float, now_s: float) -> bool:
        """Whether `own_s` more at a place in the order breaks a deadline behind it that holds without."""
        speed = self.forecast.speed / self.forecast.caution
        total = sum(self._left[:place])
        for (_, _, request_id), left in zip(self._order[place:], self._left[place:], strict=True):
            total += left
            deadline = self._live[request_id].job.deadline_s
            if deadline is not None and now_s + total / speed <= deadline < now_s + (total + own_s) / speed:
                return True
        return False


def _with_work(job: Job) -> Job:
    if not (job.before or job.rows or job.finish) or job.pictures < 1:
        raise ValueError(f"request {job.id} asks for no work")
    return job
