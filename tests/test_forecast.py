"""Predicted finish times against what then happens, on a clock that only calls move, over costs that were measured."""

import statistics

import pytest
from scheduling import job, poisson, recorded, simulate

from fewstep.runtime.costs import Costs
from fewstep.runtime.forecast import ARRIVALS, FEWEST, Forecast
from fewstep.runtime.jobs import Lane
from fewstep.runtime.pricing import Pricing

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
    assert careful == pytest.approx(1.0 + 3 * 0.1 * 0.995)
    for _ in range(200):
        forecast.kept(True)
    assert forecast.caution == pytest.approx(careful - 0.1)


def test_nobody_ahead_is_the_requests_own_cost():
    assert Forecast().ends_in(0.0, 1.0, 0.0, 0.1) == 0.1
    assert Forecast().ends_in(0.0, 1.0, 0.3, 0.1) == pytest.approx(0.4)


def test_shared_calls_shorten_the_queue_but_not_the_request():
    forecast = Forecast()
    for _ in range(2000):
        forecast.ran(0.04, 0.02)
    assert forecast.speed == pytest.approx(2.0, rel=1e-3)
    assert forecast.ends_in(0.0, 1.0, 0.3, 0.1) == pytest.approx(0.2, rel=1e-3)
    assert forecast.ends_in(0.0, 1.0, 0.0, 0.1) == 0.1


def test_requests_that_will_pass_count_while_they_can_still_come():
    """Every 0.1 s one of 0.03 s came, due 0.3 s later; one due in 2 s with 0.5 s to go ends at 0.5 / (1 - 0.3)."""
    forecast = Forecast()
    for k in range(ARRIVALS):
        forecast.arrived(0.1 * k, 0.3, 0.03)
    now = 0.1 * ARRIVALS
    assert forecast.ends_in(now, 2.0, 0.4, 0.1) == pytest.approx(0.5 / 0.7)
    assert forecast.ends_in(now, 0.2, 0.4, 0.1) == pytest.approx(0.5), "they are due later"
    assert forecast.ends_in(now, 0.8, 0.9, 0.1) == pytest.approx(1.0 + 0.5 * 0.3), "they pass for half a second only"


def test_few_arrivals_say_nothing_of_those_to_come_and_old_ones_are_forgotten():
    forecast = Forecast()
    for k in range(FEWEST - 1):
        forecast.arrived(0.1 * k, 0.1, 0.09)
    assert forecast.ends_in(2.0, 2.0, 0.4, 0.1) == 0.5
    for k in range(2 * ARRIVALS):
        forecast.arrived(2.0 + 0.1 * k, 5.0, 0.09)
    assert forecast.ends_in(2.0 + 0.1 * 2 * ARRIVALS, 2.0, 0.4, 0.1) == 0.5


def test_what_passes_is_counted_as_much_as_it_turned_out_to_delay():
    """Those that are passed end early: less is counted of what passes; late: more, and never more than all of it."""
    forecast = Forecast()
    for k in range(ARRIVALS):
        forecast.arrived(0.1 * k, 0.3, 0.03)
    now = 0.1 * ARRIVALS
    for _ in range(20):
        forecast.ended(0.2, -1.0)
    assert forecast.passing == 1.0, "nothing passes those that are due sooner"
    for _ in range(20):
        forecast.ended(2.0, -0.1)
    assert forecast.passing == pytest.approx(0.98**20)
    assert forecast.ends_in(now, 2.0, 0.4, 0.1) == pytest.approx(0.5 / (1.0 - 0.3 * 0.98**20))
    for _ in range(60):
        forecast.ended(2.0, 0.1)
    assert forecast.passing == 1.0
