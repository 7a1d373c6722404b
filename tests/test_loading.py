"""Models come and go while requests run; none is lost, and the memory budget holds."""

import threading
import time

import numpy as np
import pytest

from fewstep.runtime.engines.fake_engine import FakeEngine, fake_bundle
from fewstep.runtime.engines.torch_engine import TorchEngine
from fewstep.runtime.errors import BundleError, Closed, EngineFailed, EngineUnavailable, InvalidRequest
from fewstep.runtime.sampling.events import Progress
from fewstep.runtime.sampling.groups import Group, Student
from fewstep.runtime.sampling.loop import run_request
from fewstep.runtime.sampling.request import GenerateRequest, Helper
from fewstep.runtime.service.config import RuntimeConfig
from fewstep.runtime.service.local import Runtime

PATIENCE_S = 30.0


def ask(**settings):
    return GenerateRequest(**{"prompt": "a red cat", **settings})


class Makers:
    """Engines made as often as they are asked for, and how many are open."""

    def __init__(self, names, delay_s=0.0, engine=FakeEngine):
        self.opened, self.open, self.most = dict.fromkeys(names, 0), set(), 0
        self.engines = {name: self.maker(name) for name in names}
        self._delay_s, self._engine = delay_s, engine

    def maker(self, name):
        def make():
            time.sleep(self._delay_s)
            engine = self._engine()
            close = engine.close
            engine.close = lambda: (close(), self.open.discard(name))
            self.opened[name] += 1
            self.open.add(name)
            self.most = max(self.most, len(self.open))
            return engine

        return make


def crowded(names, fit, **settings):
    """A runtime of models of 10 bytes each, `fit` of which fit in memory."""
    makers = Makers(names, settings.pop("delay_s", 0.0))
    config = RuntimeConfig(memory_budget_bytes=10 * fit, calibration_budget_s=0.0)
    bundles = [fake_bundle(name) for name in names]
    return Runtime(bundles, engines=makers.engines, config=config, weigh=lambda bundle: 10, **settings), makers


def gate(engine, role="denoiser"):
    """Holds an engine's calls until it is opened."""
    reached, go = threading.Event(), threading.Event()

    def before(call):
        if call.role == role:
            reached.set()
            assert go.wait(PATIENCE_S)

    engine._before = before
    return reached, go


def ends(ticket):
    finals = [event for event in ticket.events() if not isinstance(event, Progress)]
    assert len(finals) == 1
    return finals[0]


def test_a_model_is_loaded_while_another_runs():
    first, second = FakeEngine(), FakeEngine()
    reached, go = gate(first)
    with Runtime([fake_bundle("a")], engines={"a": first}) as runtime:
        running = runtime.submit(ask(seed=1))
        assert reached.wait(PATIENCE_S)
        model = runtime.load(fake_bundle("b"), second)
        assert (model.name, set(runtime.models)) == ("b", {"a", "b"})
        waiting = runtime.submit(ask(seed=2), "b")
        go.set()
        assert running.result(PATIENCE_S).model == "a"
        assert waiting.result(PATIENCE_S).model == "b"
        with pytest.raises(BundleError, match="'b' is served already"):
            runtime.load(fake_bundle("b"), second)
        found = runtime.metrics()
    assert found.in_memory == {"a": True, "b": True} and found.load_s.count == 2


def test_unload_drains_and_frees():
    makers = Makers("ab")
    with Runtime([fake_bundle(name) for name in "ab"], engines=makers.engines) as runtime:
        engine = runtime._loading.served["a"].engine._engine
        reached, go = gate(engine)
        ticket = runtime.submit(ask(), "a")
        assert reached.wait(PATIENCE_S)
        leaver = threading.Thread(target=runtime.unload, args=("a",))
        leaver.start()
        while "a" not in runtime._loading.leaving:
            time.sleep(0.001)
        with pytest.raises(InvalidRequest, match="not served here any more"):
            runtime.submit(ask(), "a")
        assert runtime.submit(ask(), "b") and leaver.is_alive()
        go.set()
        assert ticket.result(PATIENCE_S).model == "a"
        leaver.join(PATIENCE_S)
        assert not leaver.is_alive() and makers.open == {"b"} and set(runtime.models) == {"b"}
        assert runtime.generate(ask()).model == "b", "the only one left needs no name"
        with pytest.raises(BundleError, match="no model 'a' is served here; served are b"):
            runtime.unload("a")
        runtime.load(fake_bundle("a"), makers.engines["a"])
        assert runtime.generate(ask(), "a").model == "a"
    assert makers.open == set(), "closing the runtime closes what it opened"


def test_unload_fails_what_takes_too_long_and_leaves_given_engines_open():
    engine = FakeEngine()
    reached, go = gate(engine)
    with Runtime([fake_bundle("a"), fake_bundle("b")], engines={"a": engine, "b": FakeEngine()}) as runtime:
        inside = [runtime.submit(ask(seed=k), "a") for k in range(3)]
        assert reached.wait(PATIENCE_S)
        threading.Timer(0.1, go.set).start()
        runtime.unload("a", drain_s=0.02)
        for ticket in inside:
            with pytest.raises(Closed, match="'a' was unloaded"):
                ticket.result(PATIENCE_S)
            ends(ticket)
        assert not engine.closed and runtime.generate(ask()).model == "b"


def test_requests_that_only_visit_a_model_hold_it_too():
    with Runtime([fake_bundle("a"), fake_bundle("b")], engines={"a": FakeEngine(), "b": FakeEngine()}) as runtime:
        engine = runtime._loading.served["a"].engine._engine
        reached, go = gate(engine)
        ticket = runtime.submit(ask(steps=2, helper=Helper(model="b", mode="pull", weight=0.3)), "a")
        assert reached.wait(PATIENCE_S)
        leaver = threading.Thread(target=runtime.unload, args=("b",))
        leaver.start()
        leaver.join(0.05)
        assert leaver.is_alive()
        go.set()
        assert ticket.result(PATIENCE_S).nfe == 3
        leaver.join(PATIENCE_S)
        assert set(runtime.models) == {"a"}


def test_least_recently_used_go_out_and_come_back_when_asked_for():
    runtime, makers = crowded("abc", 2)
    with runtime:
        assert runtime.metrics().in_memory == {"a": False, "b": True, "c": True}
        pictures = {name: runtime.generate(ask(seed=4), name).pictures[0] for name in "abcab"}
        found = runtime.metrics()
    alone = run_request(FakeEngine(), fake_bundle(), ask(seed=4)).pictures[0]
    assert all(np.array_equal(picture, alone) for picture in pictures.values())
    assert makers.most == 2, "never more than fit"
    assert found.put_out >= 3 and found.memory_bytes == 20 and found.finished == 5


def test_two_models_in_use_share_room_for_one_and_every_request_ends_well():
    runtime, makers = crowded("ab", 1, delay_s=0.002)
    with runtime:
        tickets = [(k, runtime.submit(ask(seed=k, steps=4), "ab"[k % 2])) for k in range(12)]
        for k, ticket in tickets:
            alone = run_request(FakeEngine(), fake_bundle(), ask(seed=k, steps=4)).pictures[0]
            assert np.array_equal(ticket.result(PATIENCE_S).pictures[0], alone)
            ends(ticket)
        found = runtime.metrics()
    assert makers.most == 1 and found.finished == 12 and found.put_out >= 2


def test_a_request_that_visits_two_models_that_do_not_fit_together_still_ends():
    runtime, makers = crowded("ab", 1)
    with runtime:
        request = ask(steps=2, seed=9, helper=Helper(model="b", mode="first"))
        result = runtime.generate(request, "a")
    with Runtime([fake_bundle("a"), fake_bundle("b")], engines={"a": FakeEngine(), "b": FakeEngine()}) as roomy:
        assert np.array_equal(result.pictures[0], roomy.generate(request, "a").pictures[0])
    assert makers.most == 1


def test_a_follow_up_brings_its_model_back():
    """The first request of all goes on at a model that was put out."""
    refine = Helper(model="b", mode="refine", steps=4, strength=0.5, threshold=0.5)
    runtime, makers = crowded("ba", 1, scorer=lambda prompt, picture: 0.0)
    with runtime:
        assert runtime.metrics().in_memory == {"b": False, "a": True}
        result = runtime.submit(ask(steps=2, seed=3, helper=refine), "a").result(PATIENCE_S)
    assert result.refined == (True,) and makers.opened == {"b": 2, "a": 1} and makers.most == 1


def test_a_routed_request_brings_its_model_back():
    students = (Student(model="b", centroid=(0.0,) * 8), Student(model="c", centroid=(9e9,) * 8))
    runtime, makers = crowded("bca", 1, groups=[Group(name="msd", students=students, reader="a")])
    with runtime:
        assert runtime.metrics().in_memory == {"b": False, "c": False, "a": True}
        assert runtime.submit(ask(), "msd").result(PATIENCE_S).model == "b"
    assert makers.opened == {"b": 2, "c": 1, "a": 1} and makers.most == 1


def test_a_follow_up_does_not_enter_a_model_that_leaves():
    """The model leaves while the scorer looks at the picture that it was to draw again."""
    scoring, scored = threading.Event(), threading.Event()

    def scorer(prompt, picture):
        scoring.set()
        assert scored.wait(PATIENCE_S)
        return 0.0

    refine = Helper(model="b", mode="refine", steps=4, strength=0.5, threshold=0.5)
    engines = {"a": FakeEngine(), "b": FakeEngine()}
    with Runtime([fake_bundle(name) for name in "ab"], engines=engines, scorer=scorer) as runtime:
        loading, gone = runtime._loading, []
        ticket = runtime.submit(ask(steps=2, helper=refine), "a")
        assert scoring.wait(PATIENCE_S)
        leaver = threading.Thread(target=lambda: gone.append(runtime.unload("b")))
        with loading._one:  # another model is being loaded meanwhile
            leaver.start()
            while "b" not in loading.leaving:
                time.sleep(0.001)
            scored.set()
            with pytest.raises(InvalidRequest, match="'b' is not served here any more"):
                ticket.result(PATIENCE_S)
        leaver.join(PATIENCE_S)
        assert gone == [None] and set(runtime.models) == {"a"} and not loading.leaving
        runtime.load(fake_bundle("b"), FakeEngine)
        assert runtime.generate(ask(), "b").model == "b"


def test_a_model_that_could_not_be_let_go_is_served_as_before(monkeypatch):
    with Runtime([fake_bundle(name) for name in "ab"], engines={"a": FakeEngine(), "b": FakeEngine()}) as runtime:
        with monkeypatch.context() as patch:
            patch.setattr(runtime._serving.scheduler, "drop", lambda name: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                runtime.unload("b")
        assert runtime.generate(ask(), "b").model == "b"
        runtime.unload("b")
        assert set(runtime.models) == {"a"}


def test_a_model_that_cannot_come_back_fails_its_requests_and_no_others():
    runtime, _ = crowded("ab", 1)
    with runtime:
        resident = runtime._loading.served["a"].engine
        made = resident.reopen
        resident.reopen = lambda: (_ for _ in ()).throw(EngineUnavailable("the disk is gone"))
        with pytest.raises(EngineUnavailable, match="the disk is gone"):
            runtime.generate(ask(), "a")
        assert runtime.generate(ask(), "b").model == "b"
        resident.reopen = lambda: 1 / 0
        with pytest.raises(EngineFailed, match="a cannot be opened"):
            runtime.generate(ask(), "a")
        resident.reopen = made
        assert runtime.generate(ask(), "a").model == "a", "asked again, it is tried again"


def test_models_that_cannot_fit_are_refused_and_loading_leaves_nothing_behind():
    config = RuntimeConfig(memory_budget_bytes=15)
    with pytest.raises(BundleError, match="memory_budget_bytes is 15"):
        Runtime([fake_bundle("a")], engines={"a": FakeEngine}, config=config, weigh=lambda bundle: 20)
    with Runtime([fake_bundle("a")], engines={"a": FakeEngine()}, config=config, weigh=lambda bundle: 10) as runtime:
        with pytest.raises(BundleError, match="10 that stay"):
            runtime.load(fake_bundle("b"), FakeEngine)
        assert set(runtime.models) == {"a"} and runtime.generate(ask()).model == "a"
    with Runtime([fake_bundle("a")], engines={"a": FakeEngine()}) as runtime:
        with pytest.raises(ZeroDivisionError):
            runtime.load(fake_bundle("b"), lambda: 1 / 0)
        assert set(runtime.models) == {"a"}
        runtime.load(fake_bundle("b"), FakeEngine)
        assert runtime.generate(ask(), "b").model == "b"
    with pytest.raises(ValueError, match="memory_budget_bytes"):
        RuntimeConfig(memory_budget_bytes=0)


def test_a_model_that_is_out_comes_back_for_what_drains():
    runtime, makers = crowded("ab", 1)
    with runtime:
        reached, go = gate(runtime._loading.served["b"].engine._engine)
        running = runtime.submit(ask(), "b")
        assert reached.wait(PATIENCE_S)
        waiting = runtime.submit(ask(seed=5), "a")
        leaver = threading.Thread(target=runtime.unload, args=("a",))
        leaver.start()
        go.set()
        assert waiting.result(PATIENCE_S).seeds == (5,) and running.result(PATIENCE_S).model == "b"
        leaver.join(PATIENCE_S)
        assert not leaver.is_alive() and set(runtime.models) == {"b"} and "a" not in makers.open


def test_closing_ends_those_who_wait_for_a_model():
    runtime, _ = crowded("ab", 1)
    resident = runtime._loading.served["a"].engine
    made, go = resident.reopen, threading.Event()
    resident.reopen = lambda: (go.wait(PATIENCE_S), made())[1]
    ticket = runtime.submit(ask(), "a")
    time.sleep(0.02)
    runtime.close()
    with pytest.raises(Closed):
        ticket.result(PATIENCE_S)
    go.set()


def test_real_bundles_take_turns_in_memory(tiny_lcm, tiny_dmd2):
    config = RuntimeConfig(memory_budget_bytes=1_000_000, calibration_budget_s=0.0)
    bundles = {bundle.name: bundle for bundle in (tiny_lcm, tiny_dmd2)}
    with Runtime(list(bundles.values()), engine="torch", config=config, weigh=lambda bundle: 600_000) as runtime:
        for name in (*bundles, *bundles):
            made = runtime.generate(ask(prompt="red", steps=1, seed=3), name).pictures[0]
            alone = run_request(TorchEngine(bundles[name]), bundles[name], ask(prompt="red", steps=1, seed=3)).pictures[
                0
            ]
            assert np.abs(made.astype(int) - alone.astype(int)).max() <= 1
            assert sum(runtime.metrics().in_memory.values()) == 1
