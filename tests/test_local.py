import statistics
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from fewstep.models.spec import Guidance
from fewstep.runtime.engine import DECODER, DENOISER, TEXT
from fewstep.runtime.engines.calibrate import in_turns, measure
from fewstep.runtime.engines.fake_engine import FakeEngine, Fault, fake_bundle, fake_spec
from fewstep.runtime.errors import BundleError, Cancelled, Closed, EngineFailed, InvalidRequest, Overloaded
from fewstep.runtime.sampling.events import Failed, Finished, Progress
from fewstep.runtime.sampling.loop import run_request
from fewstep.runtime.sampling.request import Control, GenerateRequest, Limits
from fewstep.runtime.service.config import RuntimeConfig
from fewstep.runtime.service.local import Runtime
from fewstep.runtime.service.ticket import Ticket

PATIENCE_S = 30.0


def ask(**settings):
    return GenerateRequest(**{"prompt": "a red cat", **settings})


def serve(engine=None, **settings):
    return Runtime([fake_bundle()], engines={"fake": engine or FakeEngine()}, **settings)


class Gate:
    """Holds an engine's calls of one role from the `first` one on, until it is opened."""

    def __init__(self, role="denoiser", first=0):
        self.reached, self.opened = threading.Event(), threading.Event()
        self._role, self._first = role, first

    def __call__(self, call):
        if call.role == self._role and call.number >= self._first:
            self.reached.set()
            assert self.opened.wait(PATIENCE_S)


def test_generate_gives_the_dull_loops_pictures_and_says_how():
    with serve() as runtime:
        result = runtime.generate(ask(steps=2, seed=5, n=2, guidance=2.5))
    alone = run_request(FakeEngine(), fake_bundle(), ask(steps=2, seed=5, n=2, guidance=2.5))
    assert all(np.array_equal(a, b) for a, b in zip(result.pictures, alone.pictures, strict=True))
    assert not np.array_equal(*result.pictures)
    assert result.pictures[0].shape == (64, 64, 3) and result.pictures[0].dtype == np.uint8
    assert (result.seeds, result.steps, result.guidance, result.nfe) == ((5, 6), 2, 2.5, 2)
    assert (result.model, result.notes) == ("fake", ())
    spent = result.timings
    assert 0 < spent.queue_s + spent.text_s + spent.denoise_s + spent.decode_s <= spent.total_s


def test_one_seed_is_one_picture_whatever_its_place():
    with serve() as runtime:
        third = runtime.generate(ask(seed=8, n=3)).pictures[2]
        alone = runtime.generate(ask(seed=10)).pictures[0]
    assert np.array_equal(third, alone)


def test_models_are_found_by_name():
    spec = fake_spec(guidance=Guidance(mode="none"))
    bundles = [fake_bundle("a"), fake_bundle("b", spec)]
    with Runtime(bundles, engines={"a": FakeEngine(), "b": FakeEngine(spec, control=False)}) as runtime:
        assert {name: (m.engine_name, m.has_control) for name, m in runtime.models.items()} == {
            "a": ("fake", True),
            "b": ("fake", False),
        }
        assert runtime.models["b"].spec is spec
        assert runtime.generate(ask(), "b").model == "b"
        for name, said in ((None, "model is missing; use one of a, b"), ("c", "model 'c' is not served here")):
            with pytest.raises(InvalidRequest, match=said) as caught:
                runtime.submit(ask(), name)
            assert caught.value.field == "model"
        edge = Control(edge=np.zeros((64, 64, 3), np.uint8))
        assert runtime.generate(ask(control=edge), "a").steps == 4
        with pytest.raises(InvalidRequest, match="has none"):
            runtime.submit(ask(control=edge), "b")


def test_wrong_openings_are_refused():
    with pytest.raises(BundleError, match="at least one"):
        Runtime([])
    with pytest.raises(BundleError, match="two bundles are named 'fake'"):
        Runtime([fake_bundle(), fake_bundle()], engines={"fake": FakeEngine()})
    with pytest.raises(BundleError, match="engines holds 'fkae'"):
        Runtime([fake_bundle()], engines={"fkae": FakeEngine()})
    with pytest.raises(EngineFailed, match="told to fail"):
        serve(FakeEngine(faults={("text", 0): Fault("fail")}), config=RuntimeConfig(calibration_budget_s=0.1))
    for settings in ({"threads": 0}, {"max_batch": 0}, {"text_cache": -1}, {"calibration_budget_s": -1.0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            RuntimeConfig(**settings)


def test_stream_gives_every_step_and_one_end():
    with serve() as runtime:
        events = list(runtime.stream(ask(steps=4, n=2)))
    assert [type(event) for event in events] == [Progress] * 8 + [Finished]
    for picture in (0, 1):
        steps = [e.step for e in events if isinstance(e, Progress) and e.picture == picture]
        assert steps == [1, 2, 3, 4]
    assert {event.ticket_id for event in events} == {events[-1].ticket_id}


def test_leaving_a_stream_cancels():
    gate = Gate(first=1)
    engine = FakeEngine(before=gate)
    with serve(engine) as runtime:
        stream = runtime.stream(ask(steps=8))
        assert next(stream).step == 1
        assert gate.reached.wait(PATIENCE_S)
        stream.close()
        gate.opened.set()
        runtime.close(drain_s=PATIENCE_S)
        assert runtime.metrics().failed == {"Cancelled": 1}
    assert sum(call.role == "denoiser" for call in engine.calls) == 2, "no step after the one that ran"


def test_cancel_takes_rows_out_at_once_and_happens_once():
    gate = Gate(first=1)
    engine = FakeEngine(before=gate)
    with serve(engine) as runtime:
        ticket = runtime.submit(ask(steps=8))
        waiting = runtime.submit(ask(seed=1))
        assert gate.reached.wait(PATIENCE_S)
        assert runtime.cancel(ticket.id) and not runtime.cancel(ticket.id) and not runtime.cancel("nobody")
        gate.opened.set()
        with pytest.raises(Cancelled):
            ticket.result(PATIENCE_S)
        assert waiting.result(PATIENCE_S).seeds == (1,)
        assert not runtime.cancel(waiting.id), "it has ended"
    assert [type(e) for e in ticket.events()][-1:] == [Failed]
    assert sum(isinstance(e, Failed) for e in ticket.events()) == 1


def test_listeners_hear_the_past_and_the_rest_from_the_runtimes_thread():
    gate = Gate(first=1)
    with serve(FakeEngine(before=gate)) as runtime:
        ticket = runtime.submit(ask(steps=2))
        assert gate.reached.wait(PATIENCE_S)
        heard = []
        ticket.listen(lambda event: heard.append((type(event), threading.current_thread().name)))
        here = threading.current_thread().name
        assert heard == [(Progress, here)]
        gate.opened.set()
        ticket.result(PATIENCE_S)
        runtime.close(PATIENCE_S)
    assert heard[1:] == [(Progress, "fewstep-engine"), (Finished, "fewstep-engine")]


def test_a_listener_that_raises_harms_nobody(caplog):
    def broken(event):
        raise KeyError("mine")

    with serve() as runtime:
        ticket = runtime.submit(ask())
        ticket.listen(broken)
        assert ticket.result(PATIENCE_S).steps == 4
        assert runtime.generate(ask()).steps == 4
    assert "a listener raised" in caplog.text


def test_nothing_follows_a_final_event():
    ticket, heard = Ticket("t"), []
    ticket.listen(heard.append)
    ticket.publish(Progress("t", 0, 1, 1))
    failed = Failed("t", Cancelled("mine"))
    for event in (failed, Progress("t", 0, 1, 1), Failed("t", Closed("later"))):
        ticket.publish(event)
    assert heard == list(ticket.events()) == [Progress("t", 0, 1, 1), failed]
    with pytest.raises(Cancelled, match="mine"):
        ticket.result(0)


def test_waiting_may_time_out_and_be_taken_up_again():
    gate = Gate()
    with serve(FakeEngine(before=gate)) as runtime:
        ticket = runtime.submit(ask())
        with pytest.raises(TimeoutError, match="has not ended"):
            ticket.result(0.01)
        gate.opened.set()
        assert ticket.result(PATIENCE_S).steps == 4


def test_a_full_queue_says_when_to_come_back():
    gate = Gate()
    with serve(FakeEngine(before=gate), limits=Limits(max_queue=2)) as runtime:
        inside = [runtime.submit(ask(seed=k)) for k in range(2)]
        with pytest.raises(Overloaded, match="2 requests are waiting") as caught:
            runtime.submit(ask())
        assert caught.value.retry_after_s > 0
        gate.opened.set()
        assert [ticket.result(PATIENCE_S).seeds for ticket in inside] == [(0,), (1,)]
        assert runtime.generate(ask()).steps == 4
        found = runtime.metrics()
    assert (found.accepted, found.finished, found.rejected) == (3, 3, {"queue": 1})


def test_deadlines_that_cannot_be_met_are_refused_once_costs_are_known():
    with serve(FakeEngine(delay_s=0.02), config=RuntimeConfig(calibration_budget_s=0.3)) as runtime:
        with pytest.raises(
            InvalidRequest, match=r"deadline_s is 0.01; this request alone takes about 0\.\d+ s"
        ) as caught:
            runtime.submit(ask(steps=8, deadline_s=0.01))
        assert caught.value.field == "deadline_s"
        refused = []
        for seed in range(30):
            try:
                runtime.submit(ask(seed=seed, steps=8, deadline_s=1.0))
            except Overloaded as error:
                refused.append(error)
        assert "too much is in front" in str(refused[0]) and refused[0].retry_after_s > 0.1
        found = runtime.metrics()
        assert found.rejected == {"deadline": 1 + len(refused)} and 1 <= found.accepted <= 8


def test_close_drains_or_fails_the_rest():
    gate = Gate(first=1)
    runtime = serve(FakeEngine(before=gate))
    ticket = runtime.submit(ask())
    assert gate.reached.wait(PATIENCE_S)
    closer = threading.Thread(target=runtime.close, args=(0.0,))
    closer.start()
    with pytest.raises(Closed):
        ticket.result(PATIENCE_S)
    gate.opened.set()
    closer.join(PATIENCE_S)
    assert not closer.is_alive()
    with pytest.raises(Closed, match="shutting down"):
        runtime.submit(ask())
    runtime.close()

    patient = serve(FakeEngine(delay_s=0.01))
    tickets = [patient.submit(ask(seed=k)) for k in range(3)]
    patient.close(drain_s=PATIENCE_S)
    assert [ticket.result(0).seeds for ticket in tickets] == [(0,), (1,), (2,)]


def test_who_waits_for_the_end_hears_of_no_step():
    ticket, ends = Ticket("t"), []
    ticket.at_end(ends.append)
    ticket.publish(Progress("t", 0, 1, 2))
    assert not ends
    failed = Failed("t", Cancelled("enough"))
    ticket.publish(failed)
    ticket.publish(Progress("t", 0, 2, 2))
    assert ends == [failed]
    ticket.at_end(ends.append)
    assert ends == [failed, failed], "told at once where it has ended"


def test_a_listener_may_close_the_runtime():
    runtime = serve()
    runtime.submit(ask()).listen(lambda event: runtime.close() if isinstance(event, Progress) else None)
    runtime._serving.thread.join(PATIENCE_S)
    assert not runtime._serving.thread.is_alive()
    assert runtime.metrics().failed == {"Closed": 1}


def test_engines_given_in_are_left_open():
    engine = FakeEngine()
    serve(engine).close()
    assert not engine.closed


def test_texts_are_encoded_once():
    spec = fake_spec(guidance=Guidance(mode="cfg", default=3.0, range=(1.0, 8.0)))
    engine = FakeEngine(spec)
    with Runtime([fake_bundle("fake", spec)], engines={"fake": engine}) as runtime:
        for seed in range(3):
            runtime.generate(ask(seed=seed))
        runtime.generate(ask(prompt="a dog"))
        runtime.generate(ask(prompt="a dog", negative_prompt="a red cat"))
        found = runtime.metrics()
    assert [call.batch for call in engine.calls if call.role == "text"] == [2, 1]
    assert (found.text_cache_hits, found.text_cache_misses) == (7, 3)


def test_the_same_new_prompt_at_once_is_encoded_once():
    gate = Gate("text")
    engine = FakeEngine(before=gate)
    with serve(engine) as runtime:
        first = runtime.submit(ask(prompt="hold"))
        assert gate.reached.wait(PATIENCE_S)
        both = [runtime.submit(ask(seed=k)) for k in range(2)]
        gate.opened.set()
        for ticket in (first, *both):
            ticket.result(PATIENCE_S)
    assert sum(call.batch for call in engine.calls if call.role == "text") == 2


def test_metrics_add_up():
    with serve(FakeEngine(faults={("decoder", 1): Fault("nan")})) as runtime:
        runtime.generate(ask(n=1, steps=2))
        with pytest.raises(EngineFailed):
            runtime.generate(ask(n=1, steps=2))
        found = runtime.metrics()
    assert (found.accepted, found.finished, found.failed, found.live) == (2, 1, {"EngineFailed": 1}, 0)
    assert found.pictures == 1
    assert found.request_s.count == found.queue_s.count == 2
    assert {stage: h.count for stage, h in found.stage_s.items()} == {
        "text": 1, "encode": 0, "denoise": 4, "decode": 2,
    }  # fmt: skip
    assert found.batch_size["denoise"].total == 4
    assert found.stage_s["denoise"].total < found.request_s.total


def test_many_callers_at_once():
    bundle, limits = fake_bundle(), Limits(max_queue=1000)
    with Runtime([bundle], engines={"fake": FakeEngine()}, limits=limits) as runtime, ThreadPoolExecutor(8) as pool:
        asked = [ask(prompt=f"a cat {k % 7}", seed=k, steps=(1, 2, 4)[k % 3]) for k in range(60)]
        results = list(pool.map(runtime.generate, asked))
        assert runtime.metrics().live == 0
    for request, result in zip(asked[::7], results[::7], strict=True):
        alone = run_request(FakeEngine(), bundle, request)
        assert np.array_equal(result.pictures[0], alone.pictures[0])


def test_a_calibrated_runtime_batches_what_pays():
    """An engine whose calls cost the same at any batch: requests that wait together run together."""
    gate = Gate("denoiser", first=10_000)
    engine = FakeEngine(delay_s=0.002, before=gate)
    with serve(engine, config=RuntimeConfig(calibration_budget_s=1.0)) as runtime:
        gate._first = 0
        tickets = [runtime.submit(ask(seed=k, steps=1)) for k in range(8)]
        gate.opened.set()
        for ticket in tickets:
            ticket.result(PATIENCE_S)
        assert runtime.metrics().batch_size["denoise"].count <= 4
    capped = FakeEngine(delay_s=0.002)
    with serve(capped, config=RuntimeConfig(calibration_budget_s=1.0, max_batch=2)) as runtime:
        runtime.generate(ask(n=8, steps=1))
    assert max(call.batch for call in capped.calls) == 2


def test_calibration_keeps_to_its_budget():
    now = [0.0]

    def call(size):
        now[0] += 0.1 * size

    found = measure(call, (2, 4, 8), (1, 0.1), 1.1, lambda: now[0])
    assert [size for size, _ in found] == [2, 2, 2]
    assert [seconds for _, seconds in found] == [pytest.approx(0.2)] * 3
    assert measure(call, (2, 4, 8), (1, 0.1), 0.0, lambda: now[0]) == []


@pytest.mark.parametrize(("budget_s", "rounds"), [(10.0, 5), (1.6, 2), (0.0, 1)])
def test_single_calls_are_measured_in_turns(budget_s, rounds):
    now, seen = [0.0], []

    def call(role):
        def run(size):
            seen.append(role)
            now[0] += 0.1 if role == DENOISER else 0.2

        return run

    turn = [TEXT, DENOISER, DECODER]
    found = in_turns({role: call(role) for role in turn}, 1, budget_s, lambda: now[0])
    assert seen == turn * (1 + rounds), "one round to warm the engine, one at least to measure"
    assert [role for role, _ in found] == turn * rounds
    assert {round(seconds, 6) for role, seconds in found if role == DENOISER} == {0.1}


def test_our_own_share_of_a_one_step_request_is_under_two_milliseconds():
    """The quickest of many, since other work on the machine only adds."""
    with serve() as runtime:
        own = []
        for seed in range(200):
            spent = runtime.generate(ask(steps=1, seed=seed)).timings
            own.append(spent.total_s - spent.text_s - spent.denoise_s - spent.decode_s)
    assert statistics.quantiles(own, n=10)[0] < 0.002


def test_reports_are_values():
    with serve() as runtime:
        ticket = runtime.submit(ask())
        before = runtime.metrics()
        ticket.result(PATIENCE_S)
        runtime.close(PATIENCE_S)
        assert runtime.metrics().finished == 1
    assert before.accepted == 1
    with pytest.raises(AttributeError):
        before.accepted = 5
    assert replace(before, accepted=2).accepted == 2
