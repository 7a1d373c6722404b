"""Predicted finish times against what then happens, on a clock that only calls move, over costs that were measured."""

import itertools
import random
import statistics

import pytest
from scheduling import PROMPT, job, measured, order_of_ends, poisson, recorded, run, simulate

from fewstep.runtime.schedule.costs import Costs
from fewstep.runtime.schedule.forecast import ARRIVALS, CAUTION_STEP, FEWEST, MISSES, MOST_DRIFT, Forecast
from fewstep.runtime.schedule.jobs import Accepted, Ended, Lane, Rejected
from fewstep.runtime.schedule.pricing import Pricing
from fewstep.runtime.schedule.scheduler import CALLS, REQUESTS, STRETCH, Scheduler

H200 = {1: 0.0167, 2: 0.0183, 3: 0.0186, 4: 0.0240, 8: 0.0425}
"""Seconds of one step of Qwen-Image at 512 pixels by batch, as SGLang's #22183 has it, ten times quicker."""
MIXED, WITH_TEACHER = {1: 5, 2: 2, 4: 3}, {1: 9, 25: 1}


def batching():
    """Costs where calls are worth sharing."""
    costs = Costs()
    for role, share in (("denoiser", 1.0), ("text", 0.15), ("decoder", 0.6)):
        for size, seconds in H200.items():
            costs.record(("m", role), size, share * seconds)
    return costs


RECORDED = {
    "scenes, onnx": lambda: recorded("scenes-lcm", "onnx"),
    "lcm-small, openvino": lambda: recorded("lcm-small", "openvino"),
}
TABLES = {**RECORDED, "h200": batching}


def capacity_per_s(costs, mix):
    """Requests a second with every call as full as pays."""
    pricing = Pricing({"m": Lane(max_batch=8)}, costs)
    least = {
        role: min(pricing.call_s("m", role, n) / n for n in (1, 2, 4, 8)) for role in ("text", "denoiser", "decoder")
    }
    steps = sum(count * share for count, share in mix.items()) / sum(mix.values())
    return 1.0 / (0.5 * least["text"] + steps * least["denoiser"] + least["decoder"])


@pytest.mark.parametrize("load", [0.6, 0.9])
@pytest.mark.parametrize("mix", [MIXED, WITH_TEACHER], ids=["1, 2 and 4 steps", "a tenth of 25 steps"])
@pytest.mark.parametrize("table", TABLES)
def test_finish_times_are_predicted_within_fifteen_percent_at_the_median(table, mix, load):
    costs = TABLES[table]()
    lives = simulate(costs, poisson(mix, load * capacity_per_s(costs, mix), 600, seed=3))[100:]
    assert all(life.reason == "finished" for life in lives)
    errors = [abs(life.predicted_s - life.ended_s) / (life.ended_s - life.arrival_s) for life in lives]
    assert statistics.median(errors) < (0.15 if table in RECORDED else 0.2)


@pytest.mark.parametrize("load", [0.9, 1.5])
@pytest.mark.parametrize("table", TABLES)
def test_of_admitted_requests_under_a_hundredth_misses_its_deadline_and_capacity_is_used(table, load):
    costs = TABLES[table]()
    capacity = capacity_per_s(costs, MIXED)
    deadline_s = 8 * Pricing({"m": Lane(max_batch=8)}, costs).job(job("4", 4)).total_s
    lives = simulate(costs, poisson(MIXED, load * capacity, 1000, seed=5), deadline=deadline_s)
    admitted = [life for life in lives if life.reason != "refused"]
    assert sum(life.reason != "finished" for life in admitted) < 0.01 * len(admitted)
    good_per_s = sum(life.reason == "finished" for life in lives) / max(life.ended_s or 0.0 for life in lives)
    assert good_per_s >= (0.75 if load < 1.0 else 0.9) * capacity


def test_promises_that_break_make_it_careful_and_kept_ones_bold_again():
    forecast = Forecast()
    forecast.kept(True)
    assert forecast.caution == 1.0
    for _ in range(3):
        forecast.kept(False)
    careful = forecast.caution
    assert careful == pytest.approx(1.0 + 3 * CAUTION_STEP * (1 - MISSES))
    for _ in range(200):
        forecast.kept(True)
    assert forecast.caution == pytest.approx(careful - 200 * CAUTION_STEP * MISSES)


@pytest.mark.parametrize("seed", range(12))
def test_a_request_that_nobody_follows_ends_when_it_was_said_to(seed):
    """From any state of the schedule: with a deadline, the prediction is that schedule itself, run ahead."""
    rng, costs, now = random.Random(seed), batching(), 0.0
    scheduler, running = Scheduler({"m": Lane(max_batch=8)}, costs, max_queue=100), None
    for number in range(rng.randrange(2, FEWEST - 1)):
        asked = job(
            str(number), rng.choice((1, 2, 4, 8)), before=(PROMPT,) * rng.randrange(2), pictures=rng.choice((1, 3))
        )
        said = scheduler.submit(asked, now)
        for _ in range(rng.randrange(3)):
            if running is None:
                running = scheduler.next(now)
            else:
                now = scheduler.running[0][0]
                run(scheduler, running, now)
                running = None
    last = scheduler.submit(job("last", rng.choice((1, 2)), deadline_s=now + 9.0, priority=2, before=(PROMPT,)), now)
    ends = {}
    while scheduler.live:
        if running is None:
            running = scheduler.next(now)
        now = scheduler.running[0][0]
        ends |= {event.id: now for event in run(scheduler, running, now) if isinstance(event, Ended)}
        running = None
    assert isinstance(said, Accepted) and isinstance(last, Accepted)
    assert ends["last"] == pytest.approx(last.finish_s)


def test_running_ahead_changes_nothing_of_the_schedule():
    scheduler = Scheduler({"m": Lane(max_batch=8)}, batching(), max_queue=100)
    for number in range(6):
        scheduler.submit(job(str(number), 1 + number % 4, before=(PROMPT,)), 0.0)
    scheduler.next(0.0)
    ahead = scheduler.copy()
    while (work := ahead.next(1.0)) is not None:
        run(ahead, work, 1.0)
    assert scheduler.live == 6 and len(scheduler.running) == 1
    assert scheduler.left_s("5") > 0.0 and scheduler.forecast.speed != ahead.forecast.speed
    assert sorted(order_of_ends(scheduler)) != sorted("012345"), "the text that is out ends for none of them"


def test_a_refusal_that_is_clear_is_cheap(monkeypatch):
    costs = measured(denoiser={1: 0.01}, decoder={1: 0.01}, text={1: 0.01})
    scheduler = Scheduler({"m": Lane(max_batch=8)}, costs, max_queue=1000)
    for number in range(10):
        scheduler.submit(job(str(number), 1, deadline_s=99.0), 0.0)
    monkeypatch.setattr("fewstep.runtime.schedule.scheduler.rehearse", lambda *_: pytest.fail("it was run ahead"))
    found = scheduler.submit(job("late", 1, deadline_s=0.1), 0.0)
    assert isinstance(found, Rejected) and found.reason == "deadline" and found.predicted_s == pytest.approx(0.22)
    monkeypatch.setattr("fewstep.runtime.schedule.scheduler.rehearse", lambda *_: 0.15)
    assert isinstance(scheduler.submit(job("soon", 1, deadline_s=0.2), 0.0), Accepted)


def test_far_from_the_end_what_is_in_front_counts_at_the_pace_of_late():
    """With more requests here than are run ahead, and after as many calls as are."""
    costs = measured(denoiser={1: 0.01}, decoder={1: 0.01}, text={1: 0.01})
    crowded = Scheduler({"m": Lane(max_batch=8)}, costs, max_queue=1000)
    for number in range(REQUESTS + 5):
        last = crowded.submit(job(str(number), 1, deadline_s=99.0), 0.0)
    assert last.finish_s == pytest.approx(0.02 * (REQUESTS + 5), rel=0.6)
    alone = Scheduler({"m": Lane(max_batch=8)}, costs, max_queue=1000)
    alone.submit(job("first", 2 * CALLS), 0.0)
    assert alone.submit(job("second", 2 * CALLS), 0.0).finish_s == pytest.approx(
        0.04 * CALLS + 0.02 + 0.02 * CALLS, rel=0.5
    )


def test_the_speed_is_how_much_of_the_work_alone_a_second_of_calls_does():
    forecast, now = Forecast(), 0.0
    for _ in range(2000):
        forecast.begins(("m", "denoiser"), 0.04, 0.02, now)
        forecast.over(now := now + 0.02)
    assert forecast.speed == pytest.approx(2.0, rel=1e-3) and forecast.pace == pytest.approx(1.0)
    assert forecast.ends_in(0.0, 1.0, 0.1) == 0.1


def test_calls_that_take_longer_than_the_table_says_are_expected_to_by_kind():
    """A denoiser's call takes twice the table's time after a decode, and the same and a half after its like."""
    forecast, now, told = Forecast(), 0.0, {}
    for k in range(3000):
        call, factor = [(("m", "denoiser"), 2.0), (("m", "denoiser"), 1.5), (("m", "decoder"), 1.0)][k % 3]
        told[k % 3] = forecast.begins(call, 0.01, 0.01, now)
        forecast.over(now := now + 0.01 * factor)
        now += 1.0  # nothing waited
    assert [told[k] for k in range(3)] == pytest.approx([0.02, 0.015, 0.01], rel=0.03)
    assert forecast.pace == pytest.approx(1.5, rel=0.01) and forecast.speed == pytest.approx(1 / 1.5, rel=0.01)
    forecast.begins(("m", "denoiser"), 0.01, 0.01, now)
    forecast.over(now + 3600.0)
    assert forecast.pace < 1.55, "a machine that stood still says little of the next call"


def test_predictions_follow_a_machine_that_others_use_too():
    """Every 600 calls it takes 1.8 times as long or as long as the table says; by the order alone they are 0.18 off."""
    costs, calls = RECORDED["scenes, onnx"](), itertools.count()
    pricing = Pricing({"m": Lane(max_batch=8)}, costs)

    def took_s(work):
        return pricing.call_s("m", work.priced, work.size) * (1.0 if next(calls) // 600 % 2 else 1.8)

    arrivals = poisson(MIXED, 0.55 * capacity_per_s(costs, MIXED), 900, seed=3)
    lives = simulate(costs, arrivals, call_s=took_s, deadline=99.0)
    off = [abs(life.predicted_s - life.ended_s) / (life.ended_s - life.arrival_s) for life in lives]
    assert statistics.median(off) < 0.13


def test_requests_that_will_pass_count_while_they_can_still_come():
    """Every 0.1 s one of 0.03 s came, due 0.3 s later; one due in 2 s with 0.5 s to go ends at 0.5 / (1 - 0.3)."""
    forecast = Forecast()
    for k in range(ARRIVALS):
        forecast.arrived(0.1 * k, 0.3, 0.03)
    now = 0.1 * ARRIVALS
    assert forecast.ends_in(now, 2.0, 0.5) == pytest.approx(0.5 / 0.7)
    assert forecast.ends_in(now, 0.2, 0.5) == pytest.approx(0.5), "they are due later"
    assert forecast.ends_in(now, 0.8, 1.0) == pytest.approx(1.0 + 0.5 * 0.3), "they pass for half a second only"


def test_few_arrivals_say_nothing_of_those_to_come_and_old_ones_are_forgotten():
    forecast = Forecast()
    for k in range(FEWEST - 1):
        forecast.arrived(0.1 * k, 0.1, 0.09)
    assert forecast.ends_in(2.0, 2.0, 0.5) == 0.5
    for k in range(2 * ARRIVALS):
        forecast.arrived(2.0 + 0.1 * k, 5.0, 0.09)
    assert forecast.ends_in(2.0 + 0.1 * 2 * ARRIVALS, 2.0, 0.5) == 0.5


def test_a_kind_that_ends_late_is_told_later_times_and_others_are_not():
    forecast = Forecast()
    for _ in range(10):
        forecast.ended(2.0, 0.1)
    assert forecast.drift(2.0) == forecast.drift(1.9) == pytest.approx(1.02**10)
    assert forecast.drift(0.2) == 1.0
    for _ in range(10):
        forecast.ended(2.0, -0.1)
    assert forecast.drift(2.0) == pytest.approx(1.02**10 * 0.98**10)
    for _ in range(300):
        forecast.ended(2.0, 0.1)
    assert forecast.drift(2.0) == MOST_DRIFT, "within bounds, whatever happens"


def test_what_is_told_follows_the_drift_of_its_kind_and_a_promise_never_counts_on_luck():
    lucky = Scheduler({"m": Lane(max_batch=8)}, batching(), max_queue=9)
    own = Pricing({"m": Lane(max_batch=8)}, batching()).job(job("a", 4)).total_s
    for slack_s in (STRETCH * own, 0.05 * own):
        for _ in range(20):
            lucky.forecast.ended(slack_s, -1.0)
    assert lucky.submit(job("a", 4), 0.0).finish_s == pytest.approx(own * 0.98**20)
    refused = lucky.submit(job("b", 4, deadline_s=1.05 * own), 0.0)
    assert isinstance(refused, Rejected) and refused.predicted_s < 1.05 * own, "both at once take longer than that"


@pytest.mark.parametrize("table", TABLES)
def test_with_deadlines_finish_times_are_predicted_within_a_tenth_at_the_median(table):
    costs = TABLES[table]()
    deadline_s = 20 * Pricing({"m": Lane(max_batch=8)}, costs).job(job("4", 4)).total_s
    arrivals = poisson(MIXED, 0.8 * capacity_per_s(costs, MIXED), 600, seed=3)
    lives = [life for life in simulate(costs, arrivals, deadline=deadline_s)[100:] if life.reason == "finished"]
    errors = [abs(life.predicted_s - life.ended_s) / (life.ended_s - life.arrival_s) for life in lives]
    assert len(lives) > 400 and statistics.median(errors) < 0.1
