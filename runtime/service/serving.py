"""The engine thread: it asks the scheduler for the next call, runs it, and publishes what follows from it.

One thread runs every model's calls. The lock of `changed` is held around the scheduler only, never around an engine
call, a scorer or a listener.
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING

from ..errors import Cancelled, Closed, DeadlineExceeded, EngineFailed, FewstepError
from ..sampling.events import Failed, Finished, Picture, Progress, Result
from ..sampling.inflight import Live
from ..sampling.loop import finished
from ..sampling.preview import show
from ..sampling.work import execute
from ..schedule.costs import Costs
from ..schedule.first_come import open_policy
from ..schedule.jobs import DENOISE, ENCODE, TEXT, Ended, Item, Job, Lane, Paused, Rejected, Stepped, Work
from .metrics import Recorder
from .ticket import Ticket

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)
_JOIN_TIMEOUT_S = 30.0


@dataclass
class Visit:
    """An accepted request. name: the model or group that was asked.

    again: (number of the picture, its request) of pictures that are drawn again, empty while `live` itself runs;
    owners: which of these each preparation of theirs is for. then: what follows once the scheduler has paused it, more
    work or None for the end; it runs in a thread of its own. shown: after which rows a preview can be had, empty where
    none is wanted; map: from latents to colours, None for the decoder.
    """

    ticket: Ticket
    live: Live
    name: str
    then: "Callable[[Visit], Job | None] | None" = None
    again: list[tuple[int, Live]] = field(default_factory=list)
    owners: list[Live] = field(default_factory=list)
    scores: tuple[float, ...] = ()
    shown: tuple[bool, ...] = ()
    map: "Tensor | None" = None

    def place(self, kind: str, item: Item) -> tuple[Live, Item]:
        """Whose share of a call an item is, and which of its pictures."""
        if not self.again:
            return self.live, item
        if kind in (TEXT, ENCODE):
            return self.owners[item.step], item
        return self.again[item.picture][1], item._replace(picture=0)

    def progress(self, event: Stepped) -> Progress:
        """A step as its caller counts: those of pictures drawn again come after the first ones."""
        first = len(self.live.plan.rows)
        if not self.again:
            return Progress(event.id, event.picture, event.step, first)
        number, live = self.again[event.picture]
        return Progress(event.id, number, first + event.step, first + len(live.plan.rows))

    def result(self, now_s: float) -> Result:
        for number, live in self.again:
            self.live.canvases[number].picture = live.canvases[0].picture
        found = finished(self.live, now_s)
        if not self.scores and self.name == found.model:
            return found
        drawn = {number: live.plan.nfe for number, live in self.again}
        refined = tuple(k in drawn for k in range(len(self.scores)))
        nfe = found.nfe + max(drawn.values(), default=0)
        return replace(found, model=self.name, nfe=nfe, scores=self.scores, refined=refined)


class Serving:
    """A scheduler, its engine thread and the requests inside."""

    def __init__(self, max_queue: int, at_end: Callable[[], None], policy: str = "earliest-due") -> None:
        self.costs = Costs()
        self.lanes: dict[str, Lane] = {}
        self.scheduler = open_policy(policy, {}, self.costs, max_queue)
        self.recorder = Recorder()
        self.changed = threading.Condition()
        self.visits: dict[str, Visit] = {}
        self.running: str | None = None
        """The model whose call is under way."""
        self.claim: Callable[[frozenset[str]], None] = lambda names: None
        """Asks whoever loads models (`Loading.claim`) for those that a follow-up visits; refused, its request fails."""
        self.closing = False
        self.stopping = False
        self.outbox: deque[Ended] = deque()
        self._at_end = at_end
        self._pauses = 0
        self._turn: tuple[Work, int, float] | None = None  # the last call: its rows, and when it began
        self._later: SimpleQueue[Visit | None] = SimpleQueue()
        self._follower: threading.Thread | None = None
        self.thread = threading.Thread(target=self._serve, name="fewstep-engine", daemon=True)

    def enter(self, visit: Visit, job: Job) -> Rejected | None:
        """Give a request to the scheduler; the lock is held by the caller."""
        now = time.monotonic()
        decision = self.scheduler.submit(job, now)
        if isinstance(decision, Rejected):
            return decision
        visit.live.predicted_s = decision.finish_s - visit.live.begun_s
        self.recorder.accepted += 1
        self.visits[job.id] = visit
        self.changed.notify_all()
        return None

    def cancel(self, ticket_id: str) -> bool:
        with self.changed:
            ended = self.scheduler.cancel(ticket_id)
            if ended is None:
                return False
            self.outbox.append(ended)
            self.changed.notify_all()
            return True

    def fail(self, ids: Sequence[str], error: FewstepError) -> None:
        """End requests; the lock is held by the caller."""
        self.outbox.extend(self.scheduler.fail(ids, error))
        self.changed.notify_all()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """No engine call runs meanwhile."""
        with self.changed:
            self._pauses += 1
            self.changed.wait_for(lambda: self.running is None)
        try:
            yield
        finally:
            with self.changed:
                self._pauses -= 1
                self.changed.notify_all()

    def close(self, drain_s: float) -> None:
        with self.changed:
            self.closing = True
            self.changed.wait_for(lambda: not self.visits, drain_s)
            self.outbox.extend(self.scheduler.close())
            self.stopping = True
            self.changed.notify_all()
        self._later.put(None)
        self._publish_outbox()
        if threading.current_thread() is not self.thread:  # a listener may close, too
            self.thread.join(_JOIN_TIMEOUT_S)

    def _serve(self) -> None:
        """The engine thread."""
        try:
            while (work := self._next_work()) is not None or not self.stopping:
                if work is not None:
                    self._run(*work)
                self._publish_outbox()
        except Exception as error:  # a fault of ours, not of a request: nobody may be left waiting
            _log.exception("the engine thread stopped")
            with self.changed:
                self.closing = self.stopping = True
                self.running = None
                for ended in self.scheduler.close():
                    self.outbox.append(Ended(ended.id, "failed", EngineFailed(f"the runtime stopped: {error!r}")))
                self.changed.notify_all()
        self._publish_outbox()
        self._at_end()

    def _next_work(self) -> tuple[Work, list[Visit]] | None:
        """Wait for something to do. None: nothing to run, but perhaps something to publish, or the end."""
        with self.changed:
            self._end_turn()
            while True:
                now = time.monotonic()
                self.outbox.extend(self.scheduler.expire(now))
                work = None if self.stopping or self._pauses else self.scheduler.next(now)
                if work is not None:
                    self.running = work.model
                    return work, [self.visits[item.id] for item in work.items]
                if self.outbox or self.stopping:
                    return None
                deadline = self.scheduler.next_deadline_s
                self.changed.wait(None if deadline is None else min(max(0.0, deadline - now), threading.TIMEOUT_MAX))

    def _end_turn(self) -> None:
        """Note what the last call cost: until the next one can begin, its events told and the results handed out."""
        if self._turn is None:
            return
        (work, size, begun_s), self._turn = self._turn, None
        if (lane := self.lanes.get(work.model)) is not None:
            self.costs.record((work.model, work.priced), *_cost(size, time.monotonic() - begun_s, lane))

    def _run(self, work: Work, visits: list[Visit]) -> None:
        """One engine call and everything that follows from it."""
        begun = time.monotonic()
        lives, call = [visit.live for visit in visits], work
        inside = {visit.ticket.id: visit for visit in visits}
        for visit in inside.values():
            visit.live.started_s = visit.live.started_s or begun
        if any(visit.again for visit in visits):
            places = [visit.place(work.kind, item) for visit, item in zip(visits, work.items, strict=True)]
            lives, call = [live for live, _ in places], replace(work, items=tuple([item for _, item in places]))
        errors, size, clean = execute(call, lives)
        seconds = time.monotonic() - begun
        for visit in inside.values():
            visit.live.spent_s[work.kind] += seconds
        wanted = work.kind == DENOISE and any(visit.shown for visit in visits)
        previews = self._previews(work, visits, errors) if wanted else {}
        stepped, paused = [], []
        with self.changed:
            self.running = None
            if size:
                self.recorder.call(work, size, seconds, len(inside))
            if size and clean:
                self._turn = work, size, begun
            for event in self.scheduler.complete(work, errors, time.monotonic()):
                if isinstance(event, Stepped):
                    stepped.append(event)
                elif isinstance(event, Paused):
                    paused.append(inside[event.id])
                else:
                    self.outbox.append(event)
            self.changed.notify_all()
        for event in stepped:
            visit = inside[event.id]
            found = visit.progress(event)
            shown = previews.get((event.id, event.picture)) if previews else None
            visit.ticket.publish(found if shown is None else replace(found, preview=shown))
        for visit in paused:
            self._follow(visit)

    def _previews(
        self, work: Work, visits: Sequence[Visit], errors: Sequence[object | None]
    ) -> dict[tuple[str, int], Picture]:
        """What the pictures of a call show after it, by request and picture, where previews are wanted and possible."""
        found: dict[tuple[str, int], Picture] = {}
        for item, visit, error in zip(work.items, visits, errors, strict=True):
            if error is not None or visit.again or not visit.shown or not visit.shown[item.step]:
                continue
            try:
                picture = show(visit.live, visit.live.canvases[item.picture], visit.map)
            except Exception as problem:  # a preview is not worth a request
                _log.warning("a preview of %s failed: %r", visit.name, problem)
                continue
            if picture is not None:
                found[item.id, item.picture] = picture
        return found

    def _follow(self, visit: Visit) -> None:
        """Let a thread of its own find out what follows, since that may take as long as an engine call."""
        if self._follower is None:
            self._follower = threading.Thread(target=self._decide, name="fewstep-follow", daemon=True)
            self._follower.start()
        self._later.put(visit)

    def _decide(self) -> None:
        while (visit := self._later.get()) is not None:
            job, error = None, None
            then, visit.then = visit.then, None
            try:
                job = None if then is None else then(visit)
            except Exception as problem:
                error = (
                    problem if isinstance(problem, FewstepError) else EngineFailed(f"a follow-up broke: {problem!r}")
                )
            with self.changed:
                if visit.ticket.id not in self.scheduler:
                    continue
                try:
                    if job is not None:
                        self.claim(job.models)
                except FewstepError as problem:
                    error = problem
                if error is not None:
                    self.fail([visit.ticket.id], error)
                elif job is None:
                    ended = self.scheduler.conclude(visit.ticket.id, time.monotonic())
                    self.outbox.extend([ended] if ended is not None else [])
                else:
                    self.scheduler.extend(job)
                self.changed.notify_all()

    def _publish_outbox(self) -> None:
        while True:
            with self.changed:
                if not self.outbox:
                    return
                ended = self.outbox.popleft()
                visit = self.visits.pop(ended.id)
                event = self._final(ended, visit)
                self.changed.notify_all()
            visit.ticket.publish(event)

    def _final(self, ended: Ended, visit: Visit) -> Finished | Failed:
        now, live, recorder = time.monotonic(), visit.live, self.recorder
        recorder.request_s.add(now - live.begun_s)
        if live.started_s is not None:
            recorder.queue_s.add(live.started_s - live.begun_s)
        if ended.reason != "finished":
            error = _failure(ended, live)
            recorder.failed[type(error).__name__] += 1
            return Failed(ended.id, error)
        recorder.finished += 1
        recorder.pictures += len(live.canvases)
        if live.predicted_s is not None:
            recorder.forecast_error.add(abs(live.predicted_s / max(1e-9, now - live.begun_s) - 1.0))
        result = visit.result(now)
        recorder.scored += len(result.scores)
        recorder.refined += sum(result.refined)
        return Finished(ended.id, result)


def _cost(size: int, seconds: float, lane: Lane) -> tuple[int, float]:
    """(size, seconds) of one call, where the work took several or was padded."""
    if size > lane.max_batch:
        return lane.max_batch, seconds * lane.max_batch / size
    return min((s for s in lane.batch_sizes if s >= size), default=size), seconds


def _failure(ended: Ended, live: Live) -> FewstepError:
    if isinstance(ended.error, FewstepError):
        return ended.error
    if ended.reason == "cancelled":
        return Cancelled("the request was cancelled")
    if ended.reason == "expired":
        return DeadlineExceeded(f"the request did not finish within deadline_s = {live.request.deadline_s}")
    if ended.reason == "closed":
        return Closed("the runtime was closed before the request finished")
    return EngineFailed(str(ended.error))
