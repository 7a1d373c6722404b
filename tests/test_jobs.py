"""Requests of every shape in one schedule: several models, pictures to encode, groups, steered rows, pauses."""

import pytest
from scheduling import FREE, PLAIN, PROMPT, STEERED, drain, job, make, measured, order_of_ends, run

from fewstep.runtime.schedule.jobs import Accepted, Ended, Lane, Paused, Prepare, RowCall, mixed
from fewstep.runtime.schedule.scheduler import Scheduler

ROWS_OF_BOTH = {"a": STEERED, "b": PLAIN, "c": STEERED, "d": PLAIN}


@pytest.mark.parametrize(
    ("together", "first_call", "role"),
    [
        (None, "ac", "denoiser+control"),  # never measured together: each kind in calls of its own
        (FREE, "abcd", "denoiser+control"),  # one call for all costs what one of either kind does
        ({1: 0.01, 8: 0.08}, "ac", "denoiser+control"),  # zeros for what steers cost as much as calls of their own
    ],
)
def test_plain_rows_join_steered_ones_where_the_cost_table_prefers_it(together, first_call, role):
    costs = measured(denoiser=FREE, denoiser_control=FREE)
    for size, seconds in (together or {}).items():
        costs.record(("m", mixed("denoiser+control")), size, seconds)
    scheduler = make(costs)
    for name, row in ROWS_OF_BOTH.items():
        scheduler.submit(job(name, rows=(row,)), 0.0)
    work = scheduler.next()
    assert ("".join(item.id for item in work.items), work.role) == (first_call, role)
    assert work.priced == (mixed(role) if len(first_call) == 4 else role)


def test_plain_rows_ahead_of_a_steered_one_take_it_along():
    costs = measured(denoiser=FREE, denoiser_control=FREE)
    for size, seconds in FREE.items():
        costs.record(("m", mixed("denoiser+control")), size, seconds)
    scheduler = make(costs)
    scheduler.submit(job("a"), 0.0)
    alone = scheduler.next()
    assert (alone.role, alone.priced) == ("denoiser", "denoiser"), "no steered row is there"
    for name, row in (("b", PLAIN), ("c", STEERED)):
        scheduler.submit(job(name, rows=(row,)), 0.0)
    assert [item.id for item in scheduler.next().items] == ["b", "c"]


def two_models(**settings):
    costs = measured(denoiser=FREE)
    for role in ("text", "encoder", "denoiser", "decoder"):
        costs.record(("n", role), 1, 0.02)
    costs.record(("m", "encoder"), 1, 0.01)
    return Scheduler({"m": Lane(max_batch=8), "n": Lane(max_batch=8)}, costs, **{"max_queue": 9, **settings})


def test_models_do_not_share_calls():
    scheduler = two_models()
    for name, model in (("a", "m"), ("b", "n"), ("c", "m")):
        scheduler.submit(job(name, model=model, rows=(RowCall(model),)), 0.0)
    calls = [[item.id for item in scheduler.next().items] for _ in range(2)]
    assert sorted(calls) == [["a", "c"], ["b"]]


def test_a_request_visits_several_models_and_meets_others_at_each():
    """A teacher does the second step of one request; its row shares the teacher's call with a request of its own."""
    scheduler = two_models()
    scheduler.submit(job("helped", rows=(PLAIN, RowCall("n", evaluations=2), PLAIN)), 0.0)
    run(scheduler, scheduler.next())
    scheduler.submit(job("own", model="n", rows=(RowCall("n"),)), 0.0)
    for size in (2, 4, 8):
        scheduler._pricing._costs.record(("n", "denoiser"), size, 0.02)
    both = scheduler.next()
    assert (both.model, both.size) == ("n", 3) and {item.id for item in both.items} == {"helped", "own"}
    run(scheduler, both)
    assert {(kind, *ids) for kind, ids in drain(scheduler)} == {
        ("decode", "own"), ("denoise", "helped"), ("decode", "helped"),
    }  # fmt: skip


def test_rows_wait_for_every_preparation_and_preparations_for_nothing():
    scheduler = two_models()
    before = (PROMPT, Prepare("text", "n", "text"), Prepare("encode", "m", "encoder"))
    scheduler.submit(job("a", before=before), 0.0)
    works = [scheduler.next() for _ in range(3)]
    assert {(work.kind, work.model, work.role) for work in works} == {part[:3] for part in before}
    assert scheduler.next() is None
    for work in works[:2]:
        run(scheduler, work)
        assert scheduler.next() is None, "a picture is still to be encoded"
    run(scheduler, works[2])
    assert [kind for kind, _ in drain(scheduler)] == ["denoise", "decode"]


def test_admission_prices_all_of_it():
    """0.01 for the text here, 0.02 there, 0.01 to encode; rows 0.01 and 0.02 with a preview each; the decode; more."""
    before = (PROMPT, Prepare("text", "n", "text"), Prepare("encode", "m", "encoder"))
    asked = job("a", before=before, rows=(PLAIN, RowCall("n")), watch="decoder", then_s=0.5)
    assert two_models().submit(asked, 0.0) == Accepted(pytest.approx(0.04 + 0.02 + 0.03 + 0.01 + 0.5))


def test_a_paused_request_goes_on_in_its_old_place_or_ends():
    scheduler = make(measured(denoiser={1: 0.01}))
    scheduler.submit(job("a", then_s=0.02), 0.0)
    run(scheduler, scheduler.next())
    assert run(scheduler, scheduler.next()) == [Paused("a")]
    assert scheduler.next() is None and scheduler.live == 1
    scheduler.submit(job("later"), 5.0)
    scheduler.extend(job("a", 2))
    assert order_of_ends(scheduler) == ["a", "later"], "its due time is of its arrival"
    for name in "bc":
        scheduler.submit(job(name, rows=(), before=(PROMPT,), finish=None, then_s=0.0, deadline_s=9.0), 6.0)
        assert run(scheduler, scheduler.next()) == [Paused(name)]
    assert scheduler.conclude("b", 8.0) == Ended("b", "finished")
    assert scheduler.conclude("c", 9.5) == Ended("c", "expired") and scheduler.conclude("c", 9.5) is None


def test_work_of_a_held_model_waits_and_the_rest_goes_on():
    scheduler = two_models()
    scheduler.submit(job("a"), 0.0)
    scheduler.submit(job("b", model="n", rows=(RowCall("n"),)), 0.0)
    scheduler.hold("m")
    assert order_of_ends(scheduler) == ["b"]
    assert scheduler.users("m") == ("a",) and scheduler.waiting_due_s("m") > 0 and scheduler.waiting_due_s("n") is None
    with pytest.raises(ValueError, match="1 requests still need m"):
        scheduler.drop("m")
    scheduler.release("m")
    assert order_of_ends(scheduler) == ["a"]
    scheduler.drop("m")
    scheduler.add("m", Lane(max_batch=1))
    assert isinstance(scheduler.submit(job("c"), 1.0), Accepted)
    assert scheduler.fail(["c", "nobody"], "gone") == [Ended("c", "failed", "gone")]


def test_a_job_without_work_is_refused():
    with pytest.raises(ValueError, match="asks for no work"):
        make().submit(job("a", rows=(), finish=None), 0.0)
