"""Which work the engine does next. A state machine: events and `now_s` in, decisions out; no torch, clock, lock or log.

A request is text work (unless its prompts are cached), then rows (one per step and picture), then decode work. Work of
different requests shares an engine call where the measured costs say that it pays.

Order. Every request has one due time, fixed when it is accepted: `arrival + STRETCH * own cost / 2^priority`, or its
deadline less its own cost where that is sooner. The earliest due goes first, and a running request yields to it at its
next step. So short requests pass long ones, urgent ones pass both, and none waits for ever, since later arrivals have
later due times.
"""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .costs import CONSIDERED, Costs, best_count
from .engine import DECODER, DENOISER, DENOISER_CONTROL, TEXT

DENOISE, DECODE = "denoise", "decode"
STRETCH = 10.0
"""A request's waiting time is in proportion when it takes this many times its own cost."""


@dataclass(frozen=True, kw_only=True)
class Lane:
    """What one model's engine can take. `mixes_control`: rows with and without ControlNet may share a call."""

    max_batch: int
    batch_sizes: tuple[int, ...] = ()
    mixes_control: bool = False


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the scheduler knows of a request. `rows` holds, per step, (network evaluations, with ControlNet?).

    prompts: text encodings still to make, 0 where cached. deadline_s: absolute, on the clock of `now_s`. finish: the
    role of the last call of each picture; where that role does all the work, there are neither prompts nor rows.
    """

    id: str
    model: str
    prompts: int
    rows: tuple[tuple[int, bool], ...]
    pictures: int = 1
    priority: int = 0
    deadline_s: float | None = None
    finish: str = DECODER


@dataclass(frozen=True)
class Accepted:
    """`finish_s`: when the request is predicted to end."""

    finish_s: float


@dataclass(frozen=True)
class Rejected:
    """reason: "queue" (too many requests), "deadline" (it or one admitted before would be late), "hopeless" (late even
    alone).

    predicted_s: how long the request would take from now.
    """

    reason: str
    retry_after_s: float
    predicted_s: float


@dataclass(frozen=True)
class Item:
    """A share of a call: step `step` of picture `picture` of a request. Text work is of the request as a whole."""

    id: str
    picture: int = 0
    step: int = 0


@dataclass(frozen=True)
class Work:
    """One engine call. kind: "text", "denoise" or "decode". `size` is its batch in prompts, evaluations or pictures."""

    kind: str
    model: str
    role: str
    items: tuple[Item, ...]
    size: int


@dataclass(frozen=True)
class Stepped:
    """A picture has done `step` steps."""

    id: str
    picture: int
    step: int


@dataclass(frozen=True)
class Ended:
    """The request's one end. reason: "finished", "failed" (with `error`), "cancelled", "expired" or "closed"."""

    id: str
    reason: str
    error: object = None


@dataclass
class _Picture:
    step: int = 0
    running: bool = False
    done: bool = False


@dataclass
class _Live:
    """`after_s[k]`: what one picture still costs once k steps are done; `text_s`: what the prompts cost."""

    job: Job
    after_s: tuple[float, ...]
    text_s: float
    pictures: list[_Picture]
    text_done: bool
    text_running: bool = False
    due_s: float = 0.0

    def remaining_s(self) -> float:
        """What the request still costs if nothing is shared."""
        text = 0.0 if self.text_done else self.text_s
        return text + sum(self.after_s[picture.step] for picture in self.pictures if not picture.done)


class Scheduler:
    """See the module text. `costs` is read here and filled by whoever measures."""

    def __init__(self, lanes: Mapping[str, Lane], costs: Costs, *, max_queue: int) -> None:
        self._lanes = dict(lanes)
        self._costs = costs
        self._max_queue = max_queue
        self._live: dict[str, _Live] = {}
        self._order: list[tuple[float, int, str]] = []  # (due, arrival number, id), earliest first
        self._arrivals = 0

    @property
    def live(self) -> int:
        """Accepted requests that have not ended."""
        return len(self._live)

    def submit(self, job: Job, now_s: float) -> Accepted | Rejected:
        """Admit a request, or say when to come back. Ids must be new."""
        if job.id in self._live:
            raise ValueError(f"request {job.id} is already here")
        new = self._price(job)
        own = new.remaining_s()
        soft = now_s + STRETCH * own * 2.0 ** -max(-8, min(8, job.priority))
        due = soft if job.deadline_s is None else min(soft, job.deadline_s - own)
        ahead, harmed = self._queue_s(due, own, now_s)
        predicted = ahead + own
        if len(self._live) >= self._max_queue:
            backlog = sum(live.remaining_s() for live in self._live.values())
            return Rejected("queue", backlog / 2, predicted)  # half the queue's time: every refused caller comes back
        if job.deadline_s is not None and self._measured(job):
            if now_s + own > job.deadline_s:
                return Rejected("hopeless", 0.0, own)
            if now_s + predicted > job.deadline_s or harmed:
                return Rejected("deadline", max(ahead, own), predicted)
        new.due_s = due
        self._live[job.id] = new
        bisect.insort(self._order, (due, self._arrivals, job.id))
        self._arrivals += 1
        return Accepted(now_s + predicted)

    def cancel(self, request_id: str) -> Ended | None:
        """End a request now; what runs of it is forgotten when it returns. None where it is not here (any more)."""
        return self._end(request_id, "cancelled") if request_id in self._live else None

    def expire(self, now_s: float) -> list[Ended]:
        """End every request whose deadline has passed."""
        late = [i for i, live in self._live.items() if live.job.deadline_s is not None and live.job.deadline_s <= now_s]
        return [self._end(request_id, "expired") for request_id in late]

    def close(self) -> list[Ended]:
        """End everything."""
        return [self._end(request_id, "closed") for request_id in list(self._live)]

    def next(self) -> Work | None:
        """The next engine call, its items marked as running; None where nothing is ready."""
        wanted: tuple[str, str, str] | None = None
        found: list[tuple[Item, int]] = []
        for _, _, request_id in self._order:
            live = self._live[request_id]
            for kind, role, item, size in self._ready(live):
                group = (live.job.model, kind, self._group(live.job.model, role))
                if wanted is None:
                    wanted = group
                if group == wanted:
                    found.append((item, size))
            if len(found) >= CONSIDERED:
                break
        if wanted is None:
            return None
        return self._take(wanted, found)

    def complete(self, work: Work, errors: Sequence[object | None], now_s: float) -> list[Stepped | Ended]:
        """Take back a call: one error (or None) per item, in order. Items of requests that have ended are dropped."""
        events: list[Stepped | Ended] = []
        for item, error in zip(work.items, errors, strict=True):
            live = self._live.get(item.id)
            if live is None:
                continue
            if error is not None:
                events.append(self._end(item.id, "failed", error))
                continue
            events += self._progress(live, item, work.kind)
            if all(picture.done for picture in live.pictures):
                late = live.job.deadline_s is not None and live.job.deadline_s <= now_s
                events.append(self._end(item.id, "expired" if late else "finished"))
        return events

    def _progress(self, live: _Live, item: Item, kind: str) -> list[Stepped | Ended]:
        if kind == TEXT:
            live.text_done, live.text_running = True, False
            return []
        picture = live.pictures[item.picture]
        picture.running = False
        if kind == DECODE:
            picture.done = True
            return []
        picture.step += 1
        return [Stepped(item.id, item.picture, picture.step)]

    def _ready(self, live: _Live) -> list[tuple[str, str, Item, int]]:
        """(kind, role, item, size) of everything of a request that may run now; decode ahead of rows."""
        job = live.job
        if not live.text_done:
            return [] if live.text_running else [(TEXT, TEXT, Item(job.id), job.prompts)]
        decodes, rows = [], []
        for number, picture in enumerate(live.pictures):
            if picture.running or picture.done:
                continue
            if picture.step == len(job.rows):
                decodes.append((DECODE, job.finish, Item(job.id, number, picture.step), 1))
            else:
                evaluations, control = job.rows[picture.step]
                rows.append((DENOISE, _role(control), Item(job.id, number, picture.step), evaluations))
        return decodes + rows

    def _group(self, model: str, role: str) -> str:
        return DENOISER if role == DENOISER_CONTROL and self._lanes[model].mixes_control else role

    def _take(self, group: tuple[str, str, str], found: list[tuple[Item, int]]) -> Work:
        """Fill one call from the candidates, most urgent first, up to the size that pays."""
        model, kind, role = group
        lane = self._lanes[model]
        sums = [0]
        for _, size in found:
            sums.append(sums[-1] + size)
        most = max(1, bisect.bisect_right(sums, lane.max_batch) - 1)
        count = best_count(len(found), most, lambda k: self._call_s(model, role, sums[k]))
        items = tuple(item for item, _ in found[:count])
        for item in items:
            live = self._live[item.id]
            if kind == TEXT:
                live.text_running = True
            else:
                live.pictures[item.picture].running = True
        if kind == DENOISE and any(self._live[i.id].job.rows[i.step][1] for i in items):
            role = DENOISER_CONTROL
        return Work(kind, model, role, items, sums[count])

    def _end(self, request_id: str, reason: str, error: object = None) -> Ended:
        live = self._live.pop(request_id)
        place = bisect.bisect_left(self._order, (live.due_s, -1, ""))
        while self._order[place][2] != request_id:
            place += 1
        del self._order[place]
        return Ended(request_id, reason, error)

    def _call_s(self, model: str, role: str, size: int) -> float:
        """Seconds of a call, counting the padding to a size that the engine has, and the calls above its largest."""
        lane = self._lanes[model]
        if size > lane.max_batch:
            whole, rest = divmod(size, lane.max_batch)
            return whole * self._call_s(model, role, lane.max_batch) + (
                self._call_s(model, role, rest) if rest else 0.0
            )
        padded = min((s for s in lane.batch_sizes if s >= size), default=size)
        return self._costs.seconds((model, role), padded)

    def _queue_s(self, due_s: float, own_s: float, now_s: float) -> tuple[float, bool]:
        """(seconds of what goes before `due_s`, whether `own_s` more there breaks a deadline that holds without)."""
        ahead, total, harmed = 0.0, 0.0, False
        for due, _, request_id in self._order:
            live = self._live[request_id]
            total += live.remaining_s()
            if due <= due_s:
                ahead = total
            elif live.job.deadline_s is not None:
                harmed |= now_s + total <= live.job.deadline_s < now_s + total + own_s
        return ahead, harmed

    def _price(self, job: Job) -> _Live:
        """A request with its costs as the table has them now."""
        calls = {row: self._call_s(job.model, _role(row[1]), row[0]) for row in set(job.rows)}
        after = [self._call_s(job.model, job.finish, 1)]
        for row in reversed(job.rows):
            after.append(after[-1] + calls[row])
        text = self._call_s(job.model, TEXT, job.prompts) if job.prompts else 0.0
        pictures = [_Picture() for _ in range(job.pictures)]
        return _Live(job, tuple(reversed(after)), text, pictures, text_done=job.prompts == 0)

    def _measured(self, job: Job) -> bool:
        roles = {_role(control) for _, control in job.rows} | {job.finish} | ({TEXT} if job.prompts else set())
        return all(self._costs.measured((job.model, role)) for role in roles)


def _role(control: bool) -> str:
    return DENOISER_CONTROL if control else DENOISER
