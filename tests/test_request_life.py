"""Every accepted request ends in exactly one final event, and the runtime goes on, whatever breaks."""

import random
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.runtime.engines.fake_engine import FakeEngine, Fault, fake_bundle
from fewstep.runtime.errors import DeadlineExceeded, EngineFailed, FewstepError
from fewstep.runtime.sampling.events import Failed, Finished, Progress
from fewstep.runtime.sampling.loop import run_request
from fewstep.runtime.sampling.request import GenerateRequest, Limits
from fewstep.runtime.service.config import RuntimeConfig
from fewstep.runtime.service.local import Runtime

PATIENCE_S = 30.0
FREE = {1: 0.01, 8: 0.0101}


def ask(**settings):
    return GenerateRequest(**{"prompt": "a red cat", **settings})


def serve(engine, **settings):
    return Runtime([fake_bundle()], engines={"fake": engine}, **settings)


def batching(runtime):
    """A cost table under which everything that waits is batched."""
    for role in ("text", "denoiser", "decoder"):
        for size, seconds in FREE.items():
            runtime._serving.costs.record(("fake", role), size, seconds)
    runtime._serving.costs.record = lambda *_: None  # the table stays as it is, whatever this machine measures
    return runtime


def picture(**settings):
    return run_request(FakeEngine(), fake_bundle(), ask(**settings)).pictures[0]


@pytest.mark.parametrize("role", ["text", "denoiser", "decoder"])
@pytest.mark.parametrize("kind", ["fail", "nan"])
def test_a_fault_fails_its_request_and_the_next_is_right(role, kind):
    with serve(FakeEngine(faults={(role, 0): Fault(kind)})) as runtime:
        ticket = runtime.submit(ask(seed=1))
        with pytest.raises(EngineFailed, match="fake"):
            ticket.result(PATIENCE_S)
        assert np.array_equal(runtime.generate(ask(seed=2)).pictures[0], picture(seed=2))
    assert sum(isinstance(event, Failed) for event in ticket.events()) == 1


def test_an_exception_of_any_kind_is_an_engine_failure():
    def explode(call):
        if call.number == 0 and call.role == "denoiser":
            raise ZeroDivisionError("inside a driver")

    with serve(FakeEngine(before=explode)) as runtime:
        with pytest.raises(EngineFailed, match="inside a driver"):
            runtime.generate(ask())
        assert runtime.generate(ask()).steps == 4


def together(engine, requests, **settings):
    """Submit all while the first engine call is held, then let them run; the tickets, at their ends."""
    go = threading.Event()
    engine._before = lambda call: go.wait(PATIENCE_S)
    with batching(serve(engine, **settings)) as runtime:
        tickets = [runtime.submit(request) for request in requests]
        go.set()
        runtime.close(drain_s=PATIENCE_S)
    return tickets


def end(ticket):
    events = list(ticket.events())
    finals = [event for event in events if not isinstance(event, Progress)]
    assert finals == events[-1:], "exactly one final event, and nothing after it"
    return finals[0]


def test_nan_in_one_row_of_a_batch_fails_that_request_only():
    requests = [ask(seed=k, steps=2) for k in range(4)]
    engine = FakeEngine(faults={("denoiser", 1): Fault("nan", rows=(1,))})
    ends = [end(ticket) for ticket in together(engine, requests)]
    assert max(call.batch for call in engine.calls if call.role == "denoiser") > 1, "there was a batch"
    assert sum(isinstance(event, Failed) for event in ends) == 1
    for request, event in zip(requests, ends, strict=True):
        if isinstance(event, Finished):
            assert np.array_equal(event.result.pictures[0], picture(seed=request.seed, steps=2))


def test_a_batch_that_breaks_is_tried_row_by_row():
    """The engine breaks whenever one certain picture is in the call: only that request fails."""
    poison = 7.0

    class Picky:
        def __init__(self):
            self._inner = FakeEngine()
            self.name, self.capabilities, self.close = "picky", self._inner.capabilities, self._inner.close
            self.calls, self._before = self._inner.calls, None

        def run(self, role, feeds):
            self._before(None)
            if role == "denoiser" and (feeds["w"] == poison).any():
                raise MemoryError("this row does not fit")
            return self._inner.run(role, feeds)

    requests = [ask(seed=k, guidance=poison if k == 2 else 3.0) for k in range(4)]
    ends = [end(ticket) for ticket in together(Picky(), requests)]
    assert [type(event) for event in ends] == [Finished, Finished, Failed, Finished]
    assert isinstance(ends[2].error, EngineFailed) and "does not fit" in str(ends[2].error)
    for k in (0, 1, 3):
        assert np.array_equal(ends[k].result.pictures[0], picture(seed=k)), "a repeated call draws no second noise"


def test_a_deadline_passes_while_others_run():
    engine = FakeEngine(faults={("denoiser", 0): Fault("slow", delay_s=0.15)})
    with serve(engine) as runtime:
        slow = runtime.submit(ask(seed=1, priority=5))
        late = runtime.submit(ask(seed=2, deadline_s=0.05, priority=-5))
        with pytest.raises(DeadlineExceeded, match=r"deadline_s = 0.05"):
            late.result(PATIENCE_S)
        assert slow.result(PATIENCE_S).seeds == (1,)


def test_a_deadline_that_passes_during_a_call_is_kept():
    go = threading.Event()
    engine = FakeEngine(before=lambda call: go.wait(PATIENCE_S))
    with serve(engine) as runtime:
        ticket = runtime.submit(ask(deadline_s=0.05))
        threading.Timer(0.1, go.set).start()
        with pytest.raises(DeadlineExceeded):
            ticket.result(PATIENCE_S)


def test_the_engine_thread_survives_a_deadline_further_off_than_it_can_wait(monkeypatch):
    monkeypatch.setattr("fewstep.runtime.sampling.request.MAX_DEADLINE_S", 1e300)
    with serve(FakeEngine()) as runtime:
        serving = runtime._serving
        with serving.paused():  # nothing can run: the thread waits for the deadline
            patient = runtime.submit(ask(deadline_s=1e10))
            with serving.changed:
                serving.changed.wait_for(lambda: not serving.thread.is_alive(), 0.1)
        assert patient.result(PATIENCE_S).seeds == (0,)
        assert runtime.generate(ask(seed=2)).seeds == (2,)


def test_a_fault_of_the_runtime_itself_leaves_nobody_waiting(caplog):
    with serve(FakeEngine(delay_s=0.01)) as runtime:

        def broken(*_):
            raise AssertionError("a bug")

        runtime._serving.scheduler.complete = broken
        tickets = [runtime.submit(ask(seed=k)) for k in range(3)]
        for ticket in tickets:
            with pytest.raises(EngineFailed, match="a bug"):
                ticket.result(PATIENCE_S)
        with pytest.raises(FewstepError, match="shutting down"):
            runtime.submit(ask())
    assert "the engine thread stopped" in caplog.text


FAULTS = st.dictionaries(
    st.tuples(st.sampled_from(["text", "denoiser", "decoder"]), st.integers(0, 12)),
    st.builds(Fault, st.sampled_from(["fail", "nan"]), st.sampled_from([(), (0,)])),
    max_size=6,
)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    faults=FAULTS,
    max_batch=st.integers(1, 8),
    batches=st.booleans(),
    drain=st.booleans(),
)
def test_random_lives(seed, faults, max_batch, batches, drain):
    """Requests, cancellations, deadlines and engine faults in any order, from several threads."""
    rng = random.Random(seed)
    engine = FakeEngine(faults=faults, max_batch=max_batch)
    runtime = serve(engine, limits=Limits(max_queue=6), config=RuntimeConfig())
    if batches:
        batching(runtime)
    tickets, lock, rejected = [], threading.Lock(), []

    def caller(own):
        for k in range(4):
            request = ask(
                prompt=own.choice(["a cat", "a dog", "two cats"]), seed=own.randrange(100), n=own.randint(1, 2),
                steps=own.choice([1, 2, 4]), priority=own.randint(-2, 2),
                deadline_s=own.choice([None, None, 0.002, 5.0]),
            )  # fmt: skip
            try:
                ticket = runtime.submit(request)
            except FewstepError as error:
                rejected.append(error)
                continue
            with lock:
                tickets.append((request, ticket))
            if own.random() < 0.3:
                runtime.cancel(ticket.id)
            if k % 2:
                end(ticket)

    threads = [threading.Thread(target=caller, args=(random.Random(rng.random()),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    runtime.close(drain_s=PATIENCE_S if drain else 0.0)
    found = runtime.metrics()
    ends = [(request, end(ticket)) for request, ticket in tickets]
    assert found.accepted == len(tickets) == found.finished + sum(found.failed.values())
    assert found.live == 0
    assert found.finished == sum(isinstance(event, Finished) for _, event in ends)
    assert sum(found.rejected.values()) == len(rejected)
    for request, event in ends:
        if isinstance(event, Finished):
            alone = run_request(FakeEngine(), fake_bundle(), request)
            assert all(np.array_equal(a, b) for a, b in zip(event.result.pictures, alone.pictures, strict=True))


def test_a_call_costs_what_passes_until_the_next_can_begin():
    """Who is told of a result may take his time; the next call waits for it, and predictions must know."""
    with serve(FakeEngine(delay_s=0.01)) as runtime:
        for seed in range(12):
            ticket = runtime.submit(ask(seed=seed))
            ticket.at_end(lambda event: time.sleep(0.03))
            ticket.result(PATIENCE_S)
        (size, seconds), *_ = runtime.costs()["fake", "decoder"]
        assert size == 1 and seconds >= 0.04


@pytest.mark.parametrize(("reply_s", "left_s"), [(0.0, 8.0), (2.0, 6.0), (50.0, 4.0)])
def test_a_deadline_leaves_its_caller_time_for_the_reply(reply_s, left_s):
    with serve(FakeEngine(delay_s=0.2)) as runtime:
        began = time.monotonic()
        ticket = runtime.submit(ask(deadline_s=8.0), reply_s=reply_s)
        assert runtime._serving.scheduler.next_deadline_s - began == pytest.approx(left_s, abs=0.3)
        ticket.result(PATIENCE_S)
