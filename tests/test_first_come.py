"""The baseline of the load figures does what it says: arrival order, whole requests, equal shapes; and the clock."""

import pytest
from scheduling import FREE, PROMPT, job, measured

from fewstep.runtime.engines.fake_engine import FakeEngine, fake_bundle
from fewstep.runtime.sampling.events import Finished
from fewstep.runtime.sampling.request import GenerateRequest
from fewstep.runtime.schedule.costs import Costs
from fewstep.runtime.schedule.first_come import FirstCome, open_policy
from fewstep.runtime.schedule.jobs import Accepted, Ended, Lane, Rejected
from fewstep.runtime.schedule.scheduler import Scheduler
from fewstep.runtime.schedule.simulation import simulate
from fewstep.runtime.service.config import RuntimeConfig
from fewstep.runtime.service.local import Runtime

LANES = {"m": Lane(max_batch=8)}
ALL_FREE = {"denoiser": FREE, "decoder": FREE, "text": FREE}


def first_come(costs=None, max_queue=100):
    return FirstCome(LANES, costs or measured(), max_queue=max_queue)


def drained(policy, now_s=0.0):
    """Every call as (kind, ids, step), and how requests ended, in order."""
    calls, ends = [], []
    while (work := policy.next(now_s)) is not None:
        calls.append((work.kind, [item.id for item in work.items]))
        for event in policy.complete(work, [None] * len(work.items), now_s):
            ends += [(event.id, event.reason)] if isinstance(event, Ended) else []
    return calls, ends


def test_nothing_passes_anything():
    policy = first_come()
    for name, steps in (("long", 8), ("short", 1), ("urgent", 1)):
        decision = policy.submit(job(name, steps, priority=5 if name == "urgent" else 0, before=(PROMPT,)), 0.0)
        assert isinstance(decision, Accepted)
    calls, ends = drained(policy)
    assert [name for name, _ in ends] == ["long", "short", "urgent"]
    order = [ids[0] for _, ids in calls]
    assert order == sorted(order, key=["long", "short", "urgent"].index), (
        "a request runs from its first call to its last"
    )


def test_requests_of_one_shape_share_every_call_and_other_shapes_none():
    policy = first_come(measured(**ALL_FREE))
    for name, steps in (("a", 2), ("b", 1), ("c", 2), ("d", 2)):
        policy.submit(job(name, steps), 0.0)
    calls, _ = drained(policy)
    together = ["a", "c", "d"]
    assert calls == [("denoise", together)] * 2 + [("decode", together), ("denoise", ["b"]), ("decode", ["b"])]


def test_a_late_comer_waits_for_the_next_batch():
    policy = first_come(measured(**ALL_FREE))
    policy.submit(job("a", 4), 0.0)
    work = policy.next(0.0)
    policy.submit(job("b", 4), 0.0)
    policy.complete(work, [None], 0.01)
    calls, ends = drained(policy, 0.01)
    assert all(len(ids) == 1 for _, ids in calls) and [name for name, _ in ends] == ["a", "b"]


def test_batches_are_as_large_as_pays_and_fit():
    slow = first_come(measured(denoiser={1: 0.01, 8: 0.08}, decoder={1: 0.01, 8: 0.08}))
    wide = first_come(measured(**ALL_FREE))
    for policy in (slow, wide):
        for number in range(20):
            policy.submit(job(str(number)), 0.0)
    assert max(len(ids) for _, ids in drained(slow)[0]) == 1
    assert max(len(ids) for _, ids in drained(wide)[0]) == 8


def test_deadlines_refuse_nothing_and_end_what_is_late():
    policy = first_come(max_queue=3)
    for name in "abc":
        assert isinstance(policy.submit(job(name, deadline_s=0.001), 0.0), Accepted)
    refused = policy.submit(job("d"), 0.0)
    assert isinstance(refused, Rejected) and refused.reason == "queue" and refused.retry_after_s > 0
    work = policy.next(0.0)
    assert policy.next_deadline_s == 0.001
    assert {ended.reason for ended in policy.expire(0.5)} == {"expired"} and policy.live == 0
    assert policy.complete(work, [None], 0.5) == []
    policy.submit(job("e", deadline_s=0.6), 0.5)
    assert drained(policy, 0.7)[1] == [("e", "expired")], "done, but late"


def test_cancelled_and_failed_requests_leave_the_rest():
    policy = first_come(measured(**ALL_FREE))
    for name in "abc":
        policy.submit(job(name, 2), 0.0)
    work = policy.next(0.0)
    assert policy.cancel("a") == Ended("a", "cancelled") and policy.cancel("a") is None
    events = policy.complete(work, [None, "NaN", None], 0.0)
    assert Ended("b", "failed", "NaN") in events
    assert drained(policy)[1] == [("c", "finished")] and policy.live == 0
    policy.submit(job("d"), 0.0)
    assert policy.fail(["d", "gone"], "unloaded") == [Ended("d", "failed", "unloaded")]
    policy.submit(job("e"), 0.0)
    assert policy.close() == [Ended("e", "closed")]


def test_models_come_and_go():
    policy = first_come()
    policy.add("n", Lane(max_batch=2))
    policy.submit(job("a"), 0.0)
    assert policy.users("m") == ("a",)
    with pytest.raises(ValueError, match="1 requests still need m"):
        policy.drop("m")
    drained(policy)
    policy.drop("m")
    policy.hold("n")
    policy.submit(job("b", model="n", rows=(job("b").rows[0]._replace(model="n"),)), 0.0)
    assert policy.next(0.0) is None
    policy.release("n")
    assert drained(policy)[1] == [("b", "finished")]


def test_a_runtime_serves_by_it():
    config = RuntimeConfig(policy="first-come")
    with Runtime([fake_bundle()], engines={"fake": FakeEngine(delay_s=0.002)}, config=config) as runtime:
        tickets = [runtime.submit(GenerateRequest(prompt="a", steps=steps, seed=steps)) for steps in (8, 4, 1)]
        ended = []
        for ticket in tickets:
            ticket.listen(lambda event: ended.append(event) if isinstance(event, Finished) else None)
        assert [ticket.result(20).steps for ticket in tickets] == [8, 4, 1]
    assert [event.ticket_id for event in ended] == [ticket.id for ticket in tickets]
    assert isinstance(open_policy("earliest-due", LANES, Costs(), 1), Scheduler)
    with pytest.raises(ValueError, match="policy is 'fifo'"):
        RuntimeConfig(policy="fifo")


def test_the_simulated_clock_moves_by_calls_and_arrivals_only():
    """One engine, 10 ms a call: a request of two steps and a decode takes 30 ms, and one behind it waits for it."""
    arrivals = [(0.0, job("a", 2)), (0.005, job("b", 2)), (1.0, job("c", 1, deadline_s=1.001))]
    a, b, c = simulate(first_come(), arrivals, lambda work: 0.01)
    assert (a.reason, a.end_s) == ("finished", pytest.approx(0.03))
    assert (b.end_s, b.predicted_s) == (pytest.approx(0.06), pytest.approx(0.065))
    assert (c.reason, c.end_s) == ("expired", pytest.approx(1.01))


def test_a_policy_that_forgets_a_request_is_found_out():
    policy = first_come()
    policy.next = lambda now_s=None: None
    with pytest.raises(ValueError, match="has nothing to do"):
        simulate(policy, [(0.0, job("a"))], lambda work: 0.01)
