"""The runtime as a library: `generate`, `stream`, `submit`, `cancel`. One engine thread runs every model's calls.

Life of a request: `submit` checks it in the caller's thread and gives it to the scheduler; the engine thread asks the
scheduler for the next call, runs it, hands the outcome back, and publishes the events that follow. The lock is held
around the scheduler only, never around an engine call or a listener.
"""

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from fewstep.models.bundle import Bundle, load_bundle
from fewstep.models.roles import picture_role
from fewstep.models.spec import SamplerSpec

from .calibrate import calibrate
from .config import DEFAULT_BUDGET_S, RuntimeConfig
from .costs import Costs
from .engine import TEXT, Engine
from .engines import open_engine
from .errors import (
    BundleError,
    Cancelled,
    Closed,
    DeadlineExceeded,
    EngineFailed,
    FewstepError,
    InvalidRequest,
    Overloaded,
)
from .events import Event, Failed, Finished, Progress, Result
from .inflight import Live
from .jobs import Ended, Job, Lane, Rejected, Stepped, Work
from .loop import admit, finished
from .metrics import Metrics, Recorder
from .request import GenerateRequest, Limits
from .scheduler import Scheduler
from .served import Served, serve
from .text import Prompts
from .ticket import Ticket
from .work import execute, fits_one_call

_log = logging.getLogger(__name__)
_JOIN_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Model:
    """A model that this runtime serves."""

    name: str
    spec: SamplerSpec
    engine_name: str
    has_control: bool


class Runtime:
    """Serves bundles in this process. Also a context manager, which closes without draining.

    engine: "auto" (the verified engine that was measured to be the fastest here) or one of
    `fewstep.runtime.engines.KINDS`. allow_unproven: open an engine built ahead for a GPU that no GPU has run yet.
    engines: ready engines by model name, used as they are and not closed here.

    Errors: `BundleError`, `SpecError`, `EngineUnavailable`; `EngineFailed` where an engine breaks while it is warmed.
    """

    def __init__(
        self,
        bundles: Sequence[Bundle | str | Path],
        *,
        engine: str = "auto",
        allow_unproven: bool = False,
        limits: Limits = Limits(),  # noqa: B008
        config: RuntimeConfig = RuntimeConfig(),  # noqa: B008
        engines: Mapping[str, Engine] | None = None,
    ) -> None:
        self._limits = limits
        self._own_engines: list[Engine] = []
        self._served: dict[str, Served] = {}
        self._lanes: dict[str, Lane] = {}
        self._costs = Costs()
        given = dict(engines or {})
        opened = [found if isinstance(found, Bundle) else load_bundle(found) for found in bundles]
        if not opened:
            raise BundleError("no bundle to serve; name at least one")
        if stray := sorted(set(given) - {bundle.name for bundle in opened}):
            raise BundleError(f"engines holds {stray[0]!r}, but the bundles are {[bundle.name for bundle in opened]}")
        try:
            for bundle in opened:
                self._add(bundle, given.get(bundle.name), engine, config, allow_unproven)
        except BaseException:
            self._close_engines()
            raise
        self.models: Mapping[str, Model] = {
            name: Model(name, s.spec, s.engine.name, s.has_control) for name, s in self._served.items()
        }
        self._scheduler = Scheduler(self._lanes, self._costs, max_queue=limits.max_queue)
        self._recorder = Recorder()
        self._live: dict[str, tuple[Live, Ticket]] = {}
        self._outbox: deque[Ended] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._stopping = False
        self._thread = threading.Thread(target=self._serve, name="fewstep-engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerateRequest, model: str | None = None) -> Ticket:
        """Accept a request; it runs from here on. `model` may be left out where there is one.

        Errors: `InvalidRequest`, `Overloaded`, `Closed`.
        """
        begun = time.monotonic()
        live = admit(self._pick(model), request, self._limits, begun, self._served)
        ticket = Ticket(secrets.token_hex(8))
        whole = self._in_one_call(live)
        job = Job(
            id=ticket.id,
            model=live.model.name,
            before=() if whole else live.before,
            rows=() if whole else live.calls,
            finish=picture_role(len(live.plan.rows)) if whole else live.decoder,
            pictures=live.request.n,
            priority=request.priority,
            deadline_s=None if request.deadline_s is None else begun + request.deadline_s,
        )
        with self._changed:
            if self._closing:
                raise Closed("the runtime is shutting down; send the request to another one")
            decision = self._scheduler.submit(job, time.monotonic())
            if isinstance(decision, Rejected):
                self._recorder.rejected["queue" if decision.reason == "queue" else "deadline"] += 1
                raise _refusal(decision, request, self._limits)
            self._recorder.accepted += 1
            self._live[ticket.id] = (live, ticket)
            self._changed.notify_all()
        return ticket

    def generate(self, request: GenerateRequest, model: str | None = None) -> Result:
        """Submit and wait.

        Errors: those of `submit` and whatever the request failed with.
        """
        return self.submit(request, model).result()

    def stream(self, request: GenerateRequest, model: str | None = None) -> Iterator[Event]:
        """Submit and give every event as it comes. Leaving the iteration early cancels the request."""
        ticket = self.submit(request, model)
        return self._follow(ticket)

    def cancel(self, ticket_id: str) -> bool:
        """End a request as `Cancelled`: its rows leave the queue now. False where it has ended already."""
        with self._changed:
            ended = self._scheduler.cancel(ticket_id)
            if ended is None:
                return False
            self._outbox.append(ended)
            self._changed.notify_all()
            return True

    def metrics(self) -> Metrics:
        caches = [served.prompts.embeddings for served in self._served.values()]
        with self._changed:
            return self._recorder.value(
                live=len(self._live), hits=sum(c.hits for c in caches), misses=sum(c.misses for c in caches)
            )

    def close(self, drain_s: float = 0.0) -> None:
        """Take no more requests, wait up to `drain_s` for those inside, fail the rest with `Closed`. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.wait_for(lambda: not self._live, drain_s)
            self._outbox.extend(self._scheduler.close())
            self._stopping = True
            self._changed.notify_all()
        self._publish_outbox()
        if threading.current_thread() is not self._thread:  # a listener may close, too
            self._thread.join(_JOIN_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _add(self, bundle: Bundle, engine: Engine | None, kind: str, config: RuntimeConfig, unproven: bool) -> None:
        if bundle.name in self._served:
            raise BundleError(f"two bundles are named {bundle.name!r}; serve one of them")
        budget_s = config.calibration_budget_s
        if engine is None:
            options = {"allow_unproven": True} if unproven else {}
            engine = open_engine(bundle, kind, threads=config.threads, **options)
            self._own_engines.append(engine)
            budget_s = DEFAULT_BUDGET_S if budget_s is None else budget_s
        prompts = Prompts(bundle, config.text_cache)
        served = serve(bundle, engine, prompts)
        lane = _lane(engine, config)
        if budget_s:
            calibrate(served, lane, self._costs, budget_s)
        self._served[bundle.name], self._lanes[bundle.name] = served, lane

    def _close_engines(self) -> None:
        while self._own_engines:
            self._own_engines.pop().close()

    def _pick(self, model: str | None) -> Served:
        if model is None and len(self._served) == 1:
            return next(iter(self._served.values()))
        if model not in self._served:
            said = "model is missing" if model is None else f"model {model!r} is not served here"
            raise InvalidRequest("model", f"{said}; use one of {', '.join(self._served)}")
        return self._served[model]

    def _in_one_call(self, live: Live) -> bool:
        """Whether one graph does the request from text to pixels, and sooner than the calls that it replaces."""
        steps, name = len(live.plan.rows), live.model.name
        whole = name, picture_role(steps)
        if whole not in self._costs.saved or not fits_one_call(live):
            return False
        return self._costs.saved[whole] > (0.0 if live.own.missing else self._costs.seconds((name, TEXT), 1))

    def _follow(self, ticket: Ticket) -> Iterator[Event]:
        try:
            yield from ticket.events()
        finally:
            self.cancel(ticket.id)

    def _serve(self) -> None:
        """The engine thread."""
        try:
            while (work := self._next_work()) is not None or not self._stopping:
                if work is not None:
                    self._run(*work)
                self._publish_outbox()
        except Exception as error:  # a fault of ours, not of a request: nobody may be left waiting
            _log.exception("the engine thread stopped")
            with self._changed:
                self._closing = self._stopping = True
                for ended in self._scheduler.close():
                    self._outbox.append(Ended(ended.id, "failed", EngineFailed(f"the runtime stopped: {error!r}")))
        self._publish_outbox()
        self._close_engines()

    def _next_work(self) -> tuple[Work, list[Live]] | None:
        """Wait for something to do. None: nothing to run, but perhaps something to publish, or the end."""
        with self._changed:
            while True:
                self._outbox.extend(self._scheduler.expire(time.monotonic()))
                work = None if self._stopping else self._scheduler.next()
                if work is not None:
                    return work, [self._live[item.id][0] for item in work.items]
                if self._outbox or self._stopping:
                    return None
                self._changed.wait()

    def _run(self, work: Work, lives: list[Live]) -> None:
        """One engine call and everything that follows from it."""
        begun = time.monotonic()
        for live in lives:
            live.started_s = live.started_s or begun
        errors, size, clean = execute(work, lives)
        seconds = time.monotonic() - begun
        for live in {id(live): live for live in lives}.values():
            live.spent_s[work.kind] += seconds
        steps = []
        with self._changed:
            if size:
                self._recorder.call(work.kind, size, seconds)
            if size and clean:
                self._costs.record((work.model, work.priced), *_cost(size, seconds, self._lanes[work.model]))
            for event in self._scheduler.complete(work, errors, time.monotonic()):
                if isinstance(event, Stepped):
                    steps.append(event)
                elif isinstance(event, Ended):
                    self._outbox.append(event)
            tickets = {item.id: self._live[item.id] for item in work.items if item.id in self._live}
        for event in steps:
            live, ticket = tickets[event.id]
            ticket.publish(Progress(event.id, event.picture, event.step, len(live.plan.rows)))

    def _publish_outbox(self) -> None:
        while True:
            with self._changed:
                if not self._outbox:
                    return
                ended = self._outbox.popleft()
                live, ticket = self._live.pop(ended.id)
                event = self._final(ended, live)
                if not self._live:
                    self._changed.notify_all()
            ticket.publish(event)

    def _final(self, ended: Ended, live: Live) -> Finished | Failed:
        now = time.monotonic()
        self._recorder.request_s.add(now - live.begun_s)
        if live.started_s is not None:
            self._recorder.queue_s.add(live.started_s - live.begun_s)
        if ended.reason == "finished":
            self._recorder.finished += 1
            self._recorder.pictures += len(live.canvases)
            return Finished(ended.id, finished(live, now))
        error = _failure(ended, live)
        self._recorder.failed[type(error).__name__] += 1
        return Failed(ended.id, error)


def _lane(engine: Engine, config: RuntimeConfig) -> Lane:
    able = engine.capabilities
    most = able.max_batch if config.max_batch is None else min(able.max_batch, config.max_batch)
    return Lane(max_batch=most, batch_sizes=able.batch_sizes)


def _cost(size: int, seconds: float, lane: Lane) -> tuple[int, float]:
    """(size, seconds) of one call, where the work took several or was padded."""
    if size > lane.max_batch:
        return lane.max_batch, seconds * lane.max_batch / size
    return min((s for s in lane.batch_sizes if s >= size), default=size), seconds


def _refusal(decision: Rejected, request: GenerateRequest, limits: Limits) -> FewstepError:
    if decision.reason == "hopeless":
        return InvalidRequest(
            "deadline_s",
            f"deadline_s is {request.deadline_s}; this request alone takes about {decision.predicted_s:.3g} s here: "
            "allow more time or ask for fewer steps",
        )
    retry = max(decision.retry_after_s, 0.01)
    why = f"{limits.max_queue} requests are waiting"
    if decision.reason == "deadline":
        why = f"deadline_s is {request.deadline_s} and too much is in front (about {decision.predicted_s:.3g} s)"
    return Overloaded(f"{why}; try again in {retry:.2g} s", retry)


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
