"""The runtime as a library: `generate`, `stream`, `submit`, `cancel`, `load`, `unload`.

Life of a request: `submit` checks it in the caller's thread and gives it to the scheduler; the engine thread
(`runtime.service.serving`) runs its calls and publishes its events. Models come and go meanwhile
(`runtime.service.loading`).
"""

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from fewstep.models.bundle import Bundle, as_bundle
from fewstep.models.roles import picture_role
from fewstep.models.spec import SamplerSpec

from ..engine import TEXT, Engine
from ..errors import BundleError, Closed, FewstepError, InvalidRequest, Overloaded
from ..sampling.events import Event, Result
from ..sampling.groups import Group, read_group
from ..sampling.inflight import Live
from ..sampling.loop import admit
from ..sampling.plan import Plan
from ..sampling.preview import find_preview, with_estimates
from ..sampling.request import GenerateRequest, Limits, Offers
from ..sampling.work import fits_one_call
from ..schedule.costs import Key
from ..schedule.jobs import Job, Rejected
from ..schedule.pricing import Pricing
from .config import RuntimeConfig
from .follow_up import Scorer, most_work, redrawing
from .loading import Loading, Maker, Opening
from .metrics import Metrics
from .residence import weight_bytes
from .serving import Serving, Visit
from .ticket import Ticket

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Model:
    """A model, or a group of models, that this runtime serves. offers: what it can do beyond its spec."""

    name: str
    spec: SamplerSpec
    engine_name: str
    has_control: bool
    offers: Offers = field(default_factory=Offers)


class Runtime:
    """Serves bundles in this process. Also a context manager, which closes without draining.

    engine: "auto" (the verified engine that was measured to be the fastest here) or one of
    `fewstep.runtime.engines.registry.KINDS`. allow_unproven: open an engine built ahead for a GPU that no GPU has run
    yet. engines: by model name, ready ones, used as they are, never put out of memory and not closed here; or functions
    that make one. groups: several models served as one, or JSON files that say so. scorer: says how good a picture is,
    for requests whose helper refines. weigh: the bytes that a bundle counts as against `config.memory_budget_bytes`.

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
        engines: Mapping[str, Engine | Maker] | None = None,
        groups: Sequence[Group | str | Path] = (),
        scorer: Scorer | None = None,
        weigh: Callable[[Bundle], int] = weight_bytes,
    ) -> None:
        self._limits, self._scorer = limits, scorer
        self._serving = Serving(limits.max_queue, lambda: self._loading.close(), config.policy)
        opening = Opening(kind=engine, allow_unproven=allow_unproven)
        self._loading = Loading(self._serving, config, opening, weigh)
        self._pricing = Pricing(self._serving.lanes, self._serving.costs)
        self._groups: dict[str, Group] = {}
        self._maps: dict[str, Tensor | None] = {}
        self.models: Mapping[str, Model] = {}
        given = dict(engines or {})
        opened = [as_bundle(found) for found in bundles]
        names = [bundle.name for bundle in opened]
        if not opened:
            raise BundleError("no bundle to serve; name at least one")
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise BundleError(f"two bundles are named {twice!r}; serve one of them")
        if stray := sorted(set(given) - set(names)):
            raise BundleError(f"engines holds {stray[0]!r}, but the bundles are {names}")
        try:
            for bundle in opened:
                self.load(bundle, given.get(bundle.name))
            for group in groups:
                self._add_group(group if isinstance(group, Group) else read_group(group))
        except BaseException:
            self._loading.close()
            raise
        self._serving.thread.start()

    def submit(self, request: GenerateRequest, model: str | None = None, *, reply_s: float = 0.0) -> Ticket:
        """Accept a request; it runs from here on. `model` may be left out where there is one.

        reply_s: what its caller needs once it has ended; a deadline leaves that time, up to half of it.

        Errors: `InvalidRequest`, `Overloaded`, `Closed`.
        """
        begun, serving = time.monotonic(), self._serving
        visit, job = self._open(self._pick(model), request, begun)
        if reply_s and request.deadline_s is not None:
            job = replace(job, deadline_s=begun + request.deadline_s - min(reply_s, request.deadline_s / 2))
        with serving.changed:
            if serving.closing:
                raise Closed("the runtime is shutting down; send the request to another one")
            self._loading.check(job.models)
            decision = serving.enter(visit, job)
            if decision is not None:
                serving.recorder.rejected["queue" if decision.reason == "queue" else "deadline"] += 1
                raise _refusal(decision, request, self._limits)
            self._loading.use(job.models)
        return visit.ticket

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
        return self._serving.cancel(ticket_id)

    def load(self, bundle: Bundle | str | Path, engine: Engine | Maker | None = None) -> Model:
        """Serve one more bundle while others run; `engine` as in `engines`. Where the memory budget asks for it, models
        that were asked for longest ago are put out; they come back when they are asked for.

        Errors: `BundleError` where its name is taken or it cannot fit; those of opening and warming its engine.
        """
        found = as_bundle(bundle)
        if found.name in self._groups:
            raise BundleError(f"a group is named {found.name!r}; a bundle needs another name")
        self._loading.load(found, engine)
        served = self._loading.served[found.name]
        self._maps[found.name] = find_preview(found)
        model = Model(found.name, served.spec, served.engine.name, served.has_control, served.offers({}))
        self.models = {**self.models, found.name: model}
        return model

    def unload(self, name: str, drain_s: float | None = None) -> None:
        """Stop serving a model: take no more requests for it, wait for those that need it, free its memory.

        drain_s: after which those still inside fail with `Closed`; None waits as long as they take.

        Errors: `BundleError` where it is not served, or a group needs it.
        """
        for group in self._groups.values():
            if name in (*group.models, group.reads_with):
                raise BundleError(f"model {name!r} is part of the group {group.name!r}, which is served")
        self._loading.unload(name, drain_s)
        self._maps.pop(name, None)
        self.models = {other: model for other, model in self.models.items() if other != name}

    def metrics(self) -> Metrics:
        caches = [served.prompts.embeddings for served in self._loading.served.values()]
        with self._serving.changed:
            residence = self._loading.residence
            return self._serving.recorder.value(
                live=len(self._serving.visits),
                hits=sum(c.hits for c in caches),
                misses=sum(c.misses for c in caches),
                in_memory={name: residence.inside(name) for name in self._loading.served},
                memory_bytes=residence.bytes,
            )

    def costs(self) -> dict[Key, list[tuple[int, float]]]:
        """What engine calls cost as measured so far: (size, seconds) per model and role."""
        with self._serving.changed:
            return self._serving.costs.table()

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests: it was closed, or its thread has failed."""
        return self._serving.closing

    def close(self, drain_s: float = 0.0) -> None:
        """Take no more requests, wait up to `drain_s` for those inside, fail the rest with `Closed`. Idempotent."""
        self._serving.close(drain_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _add_group(self, group: Group) -> None:
        if group.name in self.models:
            raise BundleError(f"group {group.name!r} has the name of something that is served; give it another")
        group.check({name: served.spec for name, served in self._loading.served.items()})
        first = self.models[group.models[0]]
        self._groups[group.name] = group
        self.models = {**self.models, group.name: replace(first, name=group.name)}

    def _pick(self, model: str | None) -> str:
        if model is None and len(self.models) == 1:
            return next(iter(self.models))
        if model is None or model not in self.models:
            said = "model is missing" if model is None else f"model {model!r} is not served here"
            raise InvalidRequest("model", f"{said}; use one of {', '.join(self.models)}")
        return model

    def _open(self, name: str, request: GenerateRequest, begun_s: float) -> tuple[Visit, Job]:
        """A request for a model or a group, and its first work."""
        ticket = Ticket(secrets.token_hex(8))
        group = self._groups.get(name)
        if group is None:
            return self._plain(ticket, name, request, begun_s)
        if group.experts:
            visit, job = self._plain(ticket, group.models[0], request, begun_s, group.assign)
            visit.name = name
            return visit, job
        if not group.by_centroid:
            return self._plain(ticket, group.by_words(request.prompt), request, begun_s)
        reader = self._loading.served[group.reads_with]
        known = reader.prompts.embeddings.peek(request.prompt)
        if known is not None:
            return self._plain(ticket, group.nearest(summary(known)), request, begun_s)
        return self._read_first(ticket, group, request, begun_s)

    def _read_first(self, ticket: Ticket, group: Group, request: GenerateRequest, begun_s: float) -> tuple[Visit, Job]:
        """A request whose text has to be encoded before its model is known; priced and checked as for the first."""
        likely = self._plain(ticket, group.models[0], request, begun_s)[1]
        reader = self._loading.served[group.reads_with]
        live = admit(reader, GenerateRequest(prompt=request.prompt), self._limits, begun_s)
        live.request = replace(live.request, deadline_s=request.deadline_s)

        def route(visit: Visit) -> Job:
            chosen = group.nearest(summary(visit.live.own.embedded[request.prompt]))
            found, job = self._plain(ticket, chosen, request, begun_s)
            found.live.spent_s, found.live.started_s = visit.live.spent_s, visit.live.started_s
            found.live.predicted_s = visit.live.predicted_s
            visit.live, visit.name, visit.then = found.live, found.name, found.then
            visit.shown, visit.map = found.shown, found.map
            return job

        then_s = self._pricing.job(likely).total_s
        job = replace(likely, model=reader.name, before=live.before, rows=(), finish=None, pictures=1, then_s=then_s)
        return Visit(ticket, live, group.name, then=route), job

    def _plain(
        self,
        ticket: Ticket,
        name: str,
        request: GenerateRequest,
        begun_s: float,
        change: Callable[[Plan], Plan] | None = None,
    ) -> tuple[Visit, Job]:
        served = self._loading.served
        if name not in served:
            raise InvalidRequest("model", f"model {name!r} is not served here any more; use another one")
        live = admit(served[name], request, self._limits, begun_s, served, change)
        visit = Visit(ticket, live, name)
        whole = self._in_one_call(live)
        job = Job(
            id=ticket.id,
            model=name,
            before=() if whole else live.before,
            rows=() if whole else live.calls,
            finish=picture_role(len(live.plan.rows)) if whole else live.decoder,
            pictures=live.request.n,
            priority=request.priority,
            deadline_s=None if request.deadline_s is None else begun_s + request.deadline_s,
        )
        if request.previews and not whole:
            live.plan, visit.shown = with_estimates(live.plan, {n: m.spec for n, m in served.items()}, name)
            visit.map = self._maps.get(name)
            job = replace(job, watch="" if visit.map is not None else live.decoder)
        if live.request.helper is not None and live.request.helper.mode == "refine":
            if self._scorer is None:
                raise InvalidRequest(
                    "helper.mode", "helper.mode 'refine' needs a scorer, and this runtime was given none"
                )
            most = self._pricing.job(most_work(live, served, job)).total_s
            visit.then, job = redrawing(self._scorer, served, job), replace(job, then_s=most)
        return visit, job

    def _in_one_call(self, live: Live) -> bool:
        """Whether one graph does the request from text to pixels, and sooner than the calls that it replaces."""
        steps, name = len(live.plan.rows), live.model.name
        whole, costs = (name, picture_role(steps)), self._serving.costs
        if whole not in costs.saved or not fits_one_call(live) or (live.request.previews and steps > 1):
            return False
        return costs.saved[whole] > (0.0 if live.own.missing else costs.seconds((name, TEXT), 1))

    def _follow(self, ticket: Ticket) -> Iterator[Event]:
        try:
            yield from ticket.events()
        finally:
            self.cancel(ticket.id)


def summary(embedding: Mapping[str, "Tensor"]) -> list[float]:
    """What of a text embedding is compared with centroids: its pooled vector [P], or the mean of its tokens [L, D]."""
    pooled = embedding["pooled"] if "pooled" in embedding else embedding["ctx"].mean(dim=0)
    found: list[float] = pooled.float().flatten().tolist()
    return found


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
