import subprocess
import sys

import pytest
from scheduling import PAIR, PROMPT, drain, job, make, measured, order_of_ends, run

from fewstep.runtime.schedule.costs import GUESS_S, Costs, best_batches
from fewstep.runtime.schedule.jobs import Accepted, Ended, Item, Rejected, Stepped
from fewstep.runtime.schedule.scheduler import STRETCH


def test_a_request_is_text_then_rows_then_decode():
    scheduler = make()
    assert isinstance(scheduler.submit(job("a", 2, before=(PROMPT,)), 0.0), Accepted)
    text = scheduler.next()
    assert (text.kind, text.role, text.size, text.items) == ("text", "text", 1, (Item("a"),))
    assert scheduler.next() is None, "nothing else of it may run meanwhile"
    assert run(scheduler, text) == []
    first = scheduler.next()
    assert (first.kind, first.role, first.items) == ("denoise", "denoiser", (Item("a", 0, 0),))
    assert run(scheduler, first) == [Stepped("a", 0, 1)]
    assert run(scheduler, scheduler.next()) == [Stepped("a", 0, 2)]
    decode = scheduler.next()
    assert (decode.kind, decode.role, decode.size) == ("decode", "decoder", 1)
    assert run(scheduler, decode) == [Ended("a", "finished")]
    assert scheduler.live == 0 and scheduler.next() is None


def test_rows_are_batched_across_requests_steps_and_step_counts_where_that_pays():
    cheap = {1: 0.01, 8: 0.011}
    scheduler = make(measured(denoiser=cheap, decoder=cheap))
    scheduler.submit(job("a", 4), 0.0)
    run(scheduler, scheduler.next())
    scheduler.submit(job("b", 2), 0.0)
    scheduler.submit(job("c", 1, rows=(PAIR,)), 0.0)
    work = scheduler.next()
    assert {(item.id, item.step) for item in work.items} == {("a", 1), ("b", 0), ("c", 0)}
    assert work.size == 4, "a pair is two evaluations"


def test_nothing_is_batched_where_it_does_not_pay_or_is_not_known_to():
    for costs in (Costs(), measured(denoiser={1: 0.01, 2: 0.02, 4: 0.04})):
        scheduler = make(costs)
        for name in "abcd":
            scheduler.submit(job(name), 0.0)
        assert len(scheduler.next().items) == 1


def test_calls_respect_the_largest_batch():
    free = {1: 0.01, 64: 0.01}
    scheduler = make(measured(denoiser=free), max_batch=4)
    for name in "abcdefg":
        scheduler.submit(job(name, rows=(PAIR,)), 0.0)
    assert scheduler.next().size == 4
    scheduler = make(measured(denoiser=free), max_batch=1)
    scheduler.submit(job("a", rows=(PAIR,)), 0.0)
    assert scheduler.next().size == 2, "a pair alone above the bound still runs; the step splits it"


def test_padding_is_counted():
    """The engine has only sizes 1 and 8: four rows would pay for eight, sixteen fill them."""
    costs = measured(denoiser={1: 0.01, 8: 0.05})
    scheduler = make(costs, batch_sizes=(1, 8))
    for name in "abcd":
        scheduler.submit(job(name), 0.0)
    assert len(scheduler.next().items) == 1
    scheduler = make(costs, batch_sizes=(1, 8))
    for name in "abcdefghijklmnop":
        scheduler.submit(job(name), 0.0)
    assert len(scheduler.next().items) == 8


def test_order_is_arrival_then_priority_then_deadline():
    scheduler = make()
    scheduler.submit(job("first"), 0.0)
    scheduler.submit(job("second"), 0.001)
    scheduler.submit(job("important", priority=3), 0.002)
    scheduler.submit(job("late", priority=-2), 0.003)
    scheduler.submit(job("urgent", deadline_s=0.03), 0.004)
    assert order_of_ends(scheduler) == ["urgent", "important", "first", "second", "late"]


def test_a_short_request_passes_a_long_one_at_a_step_boundary():
    scheduler = make()
    scheduler.submit(job("long", 25), 0.0)
    run(scheduler, scheduler.next())
    scheduler.submit(job("short"), 0.1)
    assert [ids for _, ids in drain(scheduler)][:3] == [["short"], ["short"], ["long"]]


def test_a_long_request_is_not_starved_by_short_ones_that_keep_coming():
    """Shorts arrive as fast as they are served; the long one still ends, about STRETCH times its own cost later."""
    scheduler = make(measured())
    scheduler.submit(job("long", 10), 0.0)
    now, ended = 0.0, None
    for number in range(2000):
        scheduler.submit(job(f"s{number}"), now)
        for _ in range(2):
            now += 0.01
            events = run(scheduler, scheduler.next(), now)
            if Ended("long", "finished") in events:
                ended = now
    own = 0.01 * 11
    assert ended is not None
    assert 1.5 * own < ended < 1.5 * STRETCH * own


def test_the_queue_is_bounded_and_says_when_to_come_back():
    scheduler = make(measured(), max_queue=3)
    for name in "abc":
        assert isinstance(scheduler.submit(job(name, 3), 0.0), Accepted)
    refused = scheduler.submit(job("d"), 0.0)
    assert isinstance(refused, Rejected) and refused.reason == "queue"
    assert refused.retry_after_s == pytest.approx(3 * 4 * 0.01 / 2)
    scheduler.cancel("a")
    assert isinstance(scheduler.submit(job("d"), 0.0), Accepted)


def test_admission_by_predicted_finish():
    scheduler = make(measured())
    alone = scheduler.submit(job("a", 4, deadline_s=10.02), 10.0)
    assert alone == Rejected("hopeless", 0.0, pytest.approx(0.05))
    assert scheduler.submit(job("a", 4, deadline_s=10.06), 10.0) == Accepted(pytest.approx(10.05))
    behind = scheduler.submit(job("b", 4, deadline_s=10.07), 10.0)
    assert behind == Rejected("deadline", pytest.approx(0.05), pytest.approx(0.10))
    assert scheduler.submit(job("c", 4, deadline_s=10.11), 10.0) == Accepted(pytest.approx(10.10))


def test_a_request_with_a_deadline_may_not_break_one_that_was_promised():
    scheduler = make(measured())
    assert isinstance(scheduler.submit(job("a", 4, deadline_s=0.06), 0.0), Accepted)
    assert scheduler.submit(job("b", 1, deadline_s=0.025), 0.0).reason == "deadline"
    assert isinstance(scheduler.submit(job("c", 1, deadline_s=0.071), 0.0), Accepted)


def test_guessed_costs_refuse_nobody():
    assert isinstance(make().submit(job("a", 4, deadline_s=1e-6), 0.0), Accepted)


def test_expiry():
    scheduler = make()
    scheduler.submit(job("a", deadline_s=1.0), 0.0)
    scheduler.submit(job("b"), 0.0)
    assert scheduler.expire(0.99) == []
    assert scheduler.expire(1.0) == [Ended("a", "expired")]
    assert order_of_ends(scheduler) == ["b"]


def test_finishing_after_the_deadline_is_not_finishing():
    scheduler = make()
    scheduler.submit(job("a", deadline_s=1.0), 0.0)
    run(scheduler, scheduler.next())
    assert run(scheduler, scheduler.next(), now_s=1.5) == [Ended("a", "expired")]


def test_cancel_in_flight_drops_what_comes_back_and_schedules_no_more():
    scheduler = make(measured(denoiser={1: 0.01, 8: 0.01}))
    scheduler.submit(job("a", 4), 0.0)
    scheduler.submit(job("b", 4), 0.0)
    work = scheduler.next()
    assert len(work.items) == 2
    assert scheduler.cancel("a") == Ended("a", "cancelled")
    assert scheduler.cancel("a") is None and scheduler.cancel("nobody") is None
    assert run(scheduler, work) == [Stepped("b", 0, 1)]
    assert all(ids == ["b"] for _, ids in drain(scheduler))


def test_an_item_that_failed_ends_its_request_only():
    scheduler = make(measured(denoiser={1: 0.01, 8: 0.01}))
    scheduler.submit(job("a", pictures=2), 0.0)
    scheduler.submit(job("b"), 0.0)
    work = scheduler.next()
    assert [item.id for item in work.items] == ["b", "a", "a"], "one picture is due before two"
    error = ValueError("NaN")
    assert scheduler.complete(work, [None, error, None], 0.0) == [Stepped("b", 0, 1), Ended("a", "failed", error)]
    assert order_of_ends(scheduler) == ["b"]


def test_ids_are_new():
    scheduler = make()
    scheduler.submit(job("a"), 0.0)
    with pytest.raises(ValueError, match="already"):
        scheduler.submit(job("a"), 0.0)


def test_close_ends_everything_once():
    scheduler = make()
    for name in "abc":
        scheduler.submit(job(name), 0.0)
    work = scheduler.next()
    assert {(e.id, e.reason) for e in scheduler.close()} == {(name, "closed") for name in "abc"}
    assert scheduler.close() == [] and scheduler.next() is None
    assert run(scheduler, work) == []


def test_costs_are_medians_interpolated_and_never_optimistic():
    costs = Costs()
    key = ("m", "denoiser")
    assert costs.seconds(key, 3) == 3 * GUESS_S and not costs.measured(key)
    for seconds in (0.010, 0.011, 5.0, 0.010, 0.012):
        costs.record(key, 2, seconds)
    assert costs.seconds(key, 2) == 0.011, "one slow call does not count"
    assert costs.seconds(key, 1) == 0.011, "smaller than anything measured: as dear"
    assert costs.seconds(key, 8) == pytest.approx(0.044), "larger: in proportion"
    costs.record(key, 4, 0.015)
    assert costs.seconds(key, 3) == pytest.approx(0.013)


@pytest.mark.parametrize(
    ("ready", "per_call", "expected"),
    [
        (8, lambda k: 0.01, 8),  # a batch is free: all at once
        (8, lambda k: 0.01 * k, 1),  # it saves nothing: one by one ends earlier on average
        (2, lambda k: 0.01 * (1 + k) / 2, 1),  # two together save a quarter: a tie, so not
        (8, lambda k: 0.01 * (1 + k) / 2, 3),  # with a queue behind, the same table pays
        (1, lambda k: 0.01, 1),
    ],
)
def test_best_batches_minimise_the_mean_finish(ready, per_call, expected):
    found = best_batches(ready, 8, per_call)
    assert found.size == expected


def test_pure_modules_load_no_torch():
    names = (
        "schedule.scheduler",
        "schedule.jobs",
        "schedule.pricing",
        "schedule.forecast",
        "schedule.costs",
        "sampling.request",
        "sampling.plan",
        "sampling.samplers",
        "errors",
        "sampling.events",
        "service.metrics",
        "sampling.text",
        "service.config",
        "service.ticket",
    )
    lines = "; ".join(f"import fewstep.runtime.{name}" for name in names)
    heavy = "torch", "diffusers", "transformers"
    check = f"import sys; {lines}; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", check], timeout=60, check=False).returncode == 0
