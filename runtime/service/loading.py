"""Models that come and go while requests run: loaded, unloaded, put out of memory and brought back.

A model is put out between two engine calls. Its requests keep their latents and wait, so none is lost by it.
"""

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from fewstep.models.bundle import Bundle

from ..engine import Engine
from ..engines.calibrate import calibrate
from ..engines.registry import open_engine
from ..errors import BundleError, Closed, EngineFailed, FewstepError, InvalidRequest
from ..sampling.served import Served, serve
from ..sampling.text import Prompts
from ..schedule.jobs import Lane
from .config import DEFAULT_BUDGET_S, RuntimeConfig
from .residence import Residence, Resident
from .serving import Serving

_log = logging.getLogger(__name__)

Maker = Callable[[], Engine]


@dataclass(frozen=True, kw_only=True)
class Opening:
    """How bundles get their engines: the kind that `open_engine` takes, and its option for unproven ones."""

    kind: str = "auto"
    allow_unproven: bool = False

    def open(self, bundle: Bundle, threads: int | None) -> Engine:
        options = {"allow_unproven": True} if self.allow_unproven else {}
        return open_engine(bundle, self.kind, threads=threads, **options)


@dataclass
class Loading:
    """The models of a runtime. `served` is what requests are admitted by, in memory or not."""

    serving: Serving
    config: RuntimeConfig
    opening: Opening
    weigh: Callable[[Bundle], int]
    served: dict[str, Served] = field(default_factory=dict)
    leaving: set[str] = field(default_factory=set)
    _given: set[str] = field(default_factory=set)
    _one: threading.Lock = field(default_factory=threading.Lock)
    _returner: threading.Thread | None = None

    def __post_init__(self) -> None:
        self.residence = Residence(self.config.memory_budget_bytes)
        self.serving.claim = self.claim

    def load(self, bundle: Bundle, engine: Engine | Maker | None) -> None:
        """Serve a bundle from now on, putting others out of memory where the budget asks for it.

        engine: a ready one, which stays the caller's and in memory; or what makes one, as often as it is needed.

        Errors: `BundleError` where the name is taken or the model cannot fit; those of opening and warming it.
        """
        with self._one:
            if bundle.name in self.served:
                raise BundleError(f"a bundle named {bundle.name!r} is served already; unload it first")
            size = self.weigh(bundle)
            with self.serving.changed:
                self.residence.check(bundle.name, size)
            self._make_room(bundle.name, size)
            begun = time.monotonic()
            maker = self._maker(bundle, engine)
            resident = Resident(self._open(maker), None if _is_engine(engine) else maker)
            served = serve(bundle, resident, Prompts(bundle, self.config.text_cache))
            lane = _lane(resident, self.config)
            try:
                self._calibrate(served, lane, ours=engine is None)
            except BaseException:
                self.serving.costs.forget(bundle.name)
                if not _is_engine(engine):
                    resident.close()
                raise
            with self.serving.changed:
                if self.serving.closing:
                    resident.close()
                    raise Closed("the runtime is shutting down")
                took = time.monotonic() - begun
                self.residence.enter(bundle.name, size, time.monotonic(), took, fixed=_is_engine(engine))
                self._given |= {bundle.name} if _is_engine(engine) else set()
                self.serving.lanes[bundle.name] = lane
                self.serving.scheduler.add(bundle.name, lane)
                self.served = {**self.served, bundle.name: served}
                self.serving.recorder.load_s.add(took)

    def unload(self, name: str, drain_s: float | None) -> None:
        """Take no more requests for a model, wait for those that need it, and let it go.

        drain_s: after which the rest fail with `Closed`; None waits as long as it takes.

        Errors: `BundleError` where it is not served.
        """
        serving = self.serving
        with serving.changed:
            if name not in self.served or name in self.leaving:
                raise BundleError(f"no model {name!r} is served here; served are {', '.join(self.served) or 'none'}")
            self.leaving.add(name)
        try:
            with serving.changed:
                serving.changed.wait_for(lambda: not serving.scheduler.users(name) or serving.stopping, drain_s)
                self._expel(name)
            with self._one, serving.changed:  # a load may have kept it waiting, so who is inside is asked again
                while serving.running == name or serving.scheduler.users(name):
                    self._expel(name)
                    serving.changed.wait_for(lambda: serving.running != name)
                served = self._forget(name)
        except BaseException:
            with serving.changed:
                self.leaving.discard(name)  # it is served as before, and can be unloaded again
            raise
        if name not in self._given:
            served.engine.close()
        self._given.discard(name)

    def _expel(self, name: str) -> None:
        self.serving.fail(self.serving.scheduler.users(name), Closed(f"model {name!r} was unloaded"))

    def _forget(self, name: str) -> Served:
        """Serve a model no longer, which no request and no call needs; the lock is held by the caller."""
        self.serving.scheduler.drop(name)
        served = self.served[name]
        self.served = {other: value for other, value in self.served.items() if other != name}
        self.leaving.discard(name)
        del self.serving.lanes[name]
        self.residence.forget(name)
        self.serving.costs.forget(name)
        return served

    def claim(self, names: frozenset[str]) -> None:
        """A request that is inside goes on at these models, as if it came now: those that are out of memory come back,
        and one that leaves takes no more. The lock is held by the caller.

        Errors: `InvalidRequest` where one of them is not served any more.
        """
        self.check(names)
        self.use(names)

    def check(self, names: frozenset[str]) -> None:
        """Errors: `InvalidRequest` where one of them takes no requests any more. The lock is held by the caller."""
        for name in sorted(names):
            if name not in self.served or name in self.leaving:
                raise InvalidRequest("model", f"model {name!r} is not served here any more; use another one")

    def use(self, names: frozenset[str]) -> None:
        """A request needs these models: those that are out of memory come back. The lock is held by the caller."""
        now = time.monotonic()
        here = [self.residence.use(name, now) for name in names]
        if not all(here) and self._returner is None:
            self._returner = threading.Thread(target=self._bring_back_in_turn, name="fewstep-load", daemon=True)
            self._returner.start()

    def close(self) -> None:
        """Close what was opened here; no call may run."""
        for name, served in self.served.items():
            if name not in self._given:
                served.engine.close()

    def _bring_back_in_turn(self) -> None:
        serving = self.serving
        while True:
            with serving.changed:
                serving.changed.wait_for(lambda: serving.stopping or self._wanted() is not None)
                if serving.stopping:
                    return
                name = self._wanted()
            if name is not None:
                with self._one:
                    self._bring_back(name)

    def _wanted(self) -> str | None:
        """Of the models that are out and that a request waits for, the one whose work is due first."""
        due: dict[str, float] = {}
        for name in self.served:
            if not self.residence.inside(name):
                found = self.serving.scheduler.waiting_due_s(name)
                due |= {} if found is None else {name: found}
        return min(due, key=due.__getitem__) if due else None

    def _bring_back(self, name: str) -> None:
        serving, size = self.serving, self.residence.size(name)
        if not self._make_room(name, size, patient=True):
            return
        begun = time.monotonic()
        resident = self.served[name].engine
        assert isinstance(resident, Resident)
        try:
            self._pausing(resident.bring_back)
        except Exception as error:
            _log.exception("%s could not be brought back", name)
            found = error if isinstance(error, FewstepError) else EngineFailed(f"{name} cannot be opened: {error!r}")
            with serving.changed:
                serving.fail(serving.scheduler.users(name), found)
            return
        with serving.changed:
            if serving.stopping:
                resident.close()
                return
            took = time.monotonic() - begun
            self.residence.enter(name, size, time.monotonic(), took, fixed=False)
            serving.scheduler.release(name)
            serving.recorder.load_s.add(took)
            serving.changed.notify_all()

    def _make_room(self, name: str, size: int, *, patient: bool = False) -> bool:
        """Put others out until a model fits. patient: models in use are left in memory for their time; False where the
        model is not wanted any more meanwhile."""
        serving = self.serving
        with serving.changed:
            while True:
                busy = [other for other in self.served if serving.scheduler.users(other)]
                now = time.monotonic() if patient else math.inf
                going = self.residence.victims(name, size, now, busy)
                if not isinstance(going, float):
                    break
                if serving.stopping or (patient and self._wanted() != name):
                    return False
                serving.changed.wait(None if math.isinf(going) else going)
            for other in going:
                serving.scheduler.hold(other)
            serving.changed.wait_for(lambda: serving.running not in going)
            for other in going:
                self.residence.leave(other)
                serving.recorder.put_out += 1
        for other in going:
            self.served[other].engine.close()
        return True

    def _maker(self, bundle: Bundle, engine: Engine | Maker | None) -> Maker:
        if engine is None:
            return lambda: self.opening.open(bundle, self.config.threads)
        return engine if callable(engine) else lambda: engine

    def _open(self, maker: Maker) -> Engine:
        found: list[Engine] = []
        self._pausing(lambda: found.append(maker()))
        return found[0]

    def _pausing(self, open_: Callable[[], None]) -> None:
        """Open an engine; on a CUDA device no call runs meanwhile, since it may capture graphs."""
        import torch

        if torch.cuda.is_available() and self.serving.thread.is_alive():
            with self.serving.paused():
                open_()
        else:
            open_()

    def _calibrate(self, served: Served, lane: Lane, *, ours: bool) -> None:
        budget_s = self.config.calibration_budget_s
        if budget_s is None:
            budget_s = DEFAULT_BUDGET_S if ours else 0.0
        if budget_s:
            calibrate(served, lane, self.serving.costs, budget_s)


def _is_engine(engine: Engine | Maker | None) -> bool:
    return engine is not None and not callable(engine)


def _lane(engine: Engine, config: RuntimeConfig) -> Lane:
    able = engine.capabilities
    most = able.max_batch if config.max_batch is None else min(able.max_batch, config.max_batch)
    return Lane(max_batch=most, batch_sizes=able.batch_sizes)
