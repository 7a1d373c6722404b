"""The load command: a plan that is Poisson, rows that add up, and traffic that stays on this machine."""

import asyncio
import itertools
import json
import math
import statistics
import time

import pytest
from live import fake_server

from fewstep.runtime.errors import EngineUnavailable, InvalidRequest
from fewstep.runtime.sampling.request import Limits
from fewstep.server.load import MARKS, check_loopback, command, write_page
from fewstep.server.load_compare import Plan, _capacity, _run, _until_idle
from fewstep.server.load_plan import MIXED, STEADY, WORKLOADS, Kind, Numbers, in_shares, plan_arrivals, prompt
from fewstep.server.load_report import FIRST_COME, OURS, claims, in_rounds, markdown, overhead_ms, summarise
from fewstep.server.load_servers import Server, started
from fewstep.server.load_traffic import Outcome, Target, send_alone, send_in_turn, send_traffic

ROW = {"server", "rate_per_s", "steps", "sent", "ok", "rejected", "failed", "p50_ms", "p95_ms", "p99_ms"}
ROW |= {"goodput_per_s", "deadline_missed", "mean_ms"}
EVEN = [(Kind(steps), 1.0) for steps in (1, 2, 4)]


def test_arrivals_are_a_poisson_process():
    arrivals = plan_arrivals(50.0, 100.0, EVEN, seed=0)
    times = [arrival.at_s for arrival in arrivals]
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert times == sorted(times) and times[-1] < 100.0
    assert abs(len(arrivals) - 5000) < 5 * math.sqrt(5000)
    assert statistics.stdev(gaps) == pytest.approx(statistics.mean(gaps), rel=0.1)  # exponential gaps
    assert {arrival.kind.steps for arrival in arrivals} == {1, 2, 4}
    assert arrivals == plan_arrivals(50.0, 100.0, EVEN, seed=0) != plan_arrivals(50.0, 100.0, EVEN, seed=1)


def test_rows_add_up():
    outcomes = [Outcome(1, "ok", k / 100, deadline_s=0.5) for k in range(1, 101)]
    outcomes += [Outcome(4, kind, s, deadline_s=0.5) for kind, s in (("ok", 3.0), ("rejected", 0.01), ("failed", 60.0))]
    one, four, both = summarise(outcomes, server="ours", rate_per_s=5.0, seconds=20.0)
    assert set(one) == ROW
    assert (one["steps"], one["sent"], one["ok"]) == (1, 100, 100)
    assert [one["p50_ms"], one["p95_ms"], one["p99_ms"]] == pytest.approx([500.0, 950.0, 990.0])
    assert (one["goodput_per_s"], one["deadline_missed"]) == (2.5, 50)
    assert (four["sent"], four["ok"], four["rejected"], four["failed"], four["deadline_missed"]) == (3, 1, 1, 1, 1)
    assert both["steps"] == "all" and both["sent"] == 103 and both["p99_ms"] == pytest.approx(1000.0)


def test_without_a_picture_there_is_no_percentile():
    (row,) = summarise([Outcome(4, "failed", 1.0)], server="s", rate_per_s=1.0, seconds=1.0)
    assert row["p50_ms"] is None and row["goodput_per_s"] == 0.0


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com",
        "http://10.0.0.1:8000",
        "https://127.0.0.1",
        "127.0.0.1:8000",
        "http://localhost.evil.org",
        "",
    ],
)
def test_other_machines_are_refused(url: str):
    with pytest.raises(InvalidRequest, match="only to this machine"):
        check_loopback(url)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8000/", "http://localhost:1", "http://[::1]:8000", "http://127.8.8.8:9"]
)
def test_this_machine_is_allowed(url: str):
    assert check_loopback(url) == url.rstrip("/")


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (["--rate", "0"], "rate"),
        (["--rate", "2,x"], "rate"),
        (["--rate", "1e9"], "rate"),
        (["--steps", "1.5"], "steps"),
        (["--seconds", "0"], "seconds"),
        (["--seconds", "601"], "seconds"),
        (["--seconds", "600", "--rate", "1000"], "seconds"),
        (["--url", "http://example.com"], "url"),
    ],
)
def test_unbounded_traffic_is_refused(flags: list[str], field: str):
    with pytest.raises(InvalidRequest) as caught:
        command(flags)
    assert caught.value.field == field


def test_a_run_writes_its_rows(tmp_path, capsys):
    with fake_server() as live:
        file = tmp_path / "load.json"
        flags = ["--url", live.url, "--rate", "20,40", "--seconds", "1", "--steps", "1,4", "--json", str(file)]
        assert command(flags) == 0
        finished = live.runtime.metrics().finished - 1  # the warm-up
    rows = json.loads(file.read_text())["rows"]
    assert [(row["rate_per_s"], row["steps"]) for row in rows] == [(r, s) for r in (20.0, 40.0) for s in (1, 4, "all")]
    both = [row for row in rows if row["steps"] == "all"]
    assert sum(row["sent"] for row in both) == sum(row["ok"] for row in both) == finished > 20
    assert all(row["failed"] == 0 and 0 < row["p50_ms"] <= row["p99_ms"] for row in rows)
    assert "goodput_per_s" in capsys.readouterr().out


def test_refusals_are_counted_apart_from_failures(tmp_path):
    with fake_server(limits=Limits(max_queue=1), delay_s=0.05) as live:
        file = tmp_path / "load.json"
        assert command(["--url", live.url, "--rate", "40", "--seconds", "1", "--json", str(file)]) == 0
        (row,) = json.loads(file.read_text())["rows"]
        assert row["rejected"] > 0 and row["ok"] > 0 and row["failed"] == 0
        assert command(["--url", live.url, "--rate", "5", "--seconds", "1", "--steps", "3", "--json", str(file)]) == 1
        (row,) = json.loads(file.read_text())["rows"]
        assert row["failed"] == row["sent"] > 0 and row["p50_ms"] is None


def test_shares_are_kept_and_spread():
    kinds = in_shares(MIXED.mix, 9)
    assert [kinds.count(kind) for kind in MIXED.kinds] == [3, 3, 3]
    teachers = next(w for w in WORKLOADS if w.name == "teachers")
    steps = [kind.steps for kind in in_shares(teachers.mix, 40)]
    assert [steps.count(k) for k in (1, 2, 4, 25)] == [12, 12, 12, 4]
    assert max(b - a for a, b in itertools.pairwise([k for k, s in enumerate(steps) if s == 25])) <= 12


def test_no_prompt_comes_twice_in_a_run():
    assert len({prompt(number) for number in range(153_760)}) == 153_760


def test_a_server_is_told_what_is_left_of_the_deadline_and_late_answers_are_counted():
    with fake_server(delay_s=0.03) as live:
        target = Target(live.url, ("fake",), native=True)
        arrivals = plan_arrivals(60.0, 0.7, EVEN, seed=3)
        outcomes = asyncio.run(send_traffic(target, arrivals, deadline_s=0.4, patience_s=1.0))
        seen = live.runtime.metrics()
    kinds = {kind: sum(o.kind == kind for o in outcomes) for kind in ("ok", "rejected", "late", "failed")}
    assert kinds["failed"] == 0 and kinds["ok"] > 0 and kinds["rejected"] + kinds["late"] > 0
    assert len(outcomes) == len(arrivals) and seen.finished - 1 == kinds["ok"]
    told = [o.timings for o in outcomes if o.kind == "ok"]
    assert all(timings["predicted_s"] > 0 for timings in told)
    (row,) = [r for r in summarise(outcomes, server="s", rate_per_s=60, seconds=0.7) if r["steps"] == "all"]
    assert row["deadline_missed"] == kinds["late"] + sum(o.latency_s > 0.4 for o in outcomes if o.kind == "ok")
    assert row["prediction_error"] >= 0 and row["encode_ms"] > 0


def test_those_still_out_when_patience_ends_are_late():
    with fake_server(delay_s=0.5) as live:
        target = Target(live.url, (None,))
        outcomes = asyncio.run(send_traffic(target, plan_arrivals(20.0, 0.3, EVEN, seed=0), patience_s=0.1))
    assert outcomes and {o.kind for o in outcomes} == {"late"}


def test_overhead_is_what_no_stage_took():
    timings = {"text_s": 0.001, "denoise_s": 0.004, "decode_s": 0.002, "encode_s": 0.001}
    outcomes = [Outcome(1, "ok", 0.010, timings), Outcome(1, "ok", 0.011, timings), Outcome(1, "ok", 0.5, timings)]
    assert overhead_ms([*outcomes, Outcome(1, "failed", 9.0)]) == pytest.approx(3.0)


REPORT = {
    "command": "fewstep bench load a", "machine": {"cpu": "a CPU"}, "engines": {"a": "onnx"}, "threads": 1,
    "claims": [{"claim": "x", "found": 1.0}],
    "rows": [
        {"workload": "mixed", "server": "fewstep", "rate_per_s": 3.0, "steps": 1, "sent": 2, "ok": 2, "rejected": 0,
         "p50_ms": 1.0, "p95_ms": 2.0, "p99_ms": 3.0, "mean_ms": 1.5, "goodput_per_s": 2.0, "deadline_missed": 0}
    ],
}  # fmt: skip


def test_a_page_keeps_its_words_and_gets_its_figures(tmp_path):
    page = tmp_path / "serving.md"
    page.write_text("before\n" + MARKS[0] + "old figures\n" + MARKS[1] + "after\n")
    write_page(page, REPORT)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old figures" not in text
    assert "Made by `fewstep bench load a`: a on onnx, 1 thread(s). cpu a CPU." in text
    assert "| fewstep | 1 | 2 | 2 | 0 | 1.0 | 2.0 | 3.0 | 1.5 | 2.0 | 0 | - | - | - |" in text
    assert "(serving/mixed-p99.svg)" in text and (tmp_path / "serving" / "mixed-p99.svg").read_text().startswith("<svg")
    before = text
    write_page(page, REPORT)
    assert page.read_text() == before
    page.write_text("no marks")
    with pytest.raises(InvalidRequest, match="no place for the report"):
        write_page(page, REPORT)


@pytest.mark.parametrize(("flags", "field"), [(["a", "b", "c"], "bundles"), (["a", "--seconds", "0.5"], "seconds")])
def test_side_by_side_refuses_what_it_cannot_do(flags, field):
    with pytest.raises(InvalidRequest) as caught:
        command(flags)
    assert caught.value.field == field


def test_the_compared_servers_start_answer_and_end(tiny_lcm):
    """Both kinds of child: the scheduler's (with a policy) and plain diffusers, from the same bundle."""
    arguments = ["first-come", str(tiny_lcm.root), "--engine", "torch"]
    with started("first-come", "fewstep.server.load_servers", arguments, threads=1, native=True) as server:
        outcomes, seconds = asyncio.run(send_in_turn(server.target, [Kind(1), Kind(4)], at_once=2, first=0))
        assert [o.kind for o in outcomes] == ["ok", "ok"] and seconds > 0
        alone = send_alone(server.target, [Kind(1), Kind(4)], first=10)
        assert [(o.steps, o.kind) for o in alone] == [(1, "ok"), (4, "ok")]
        assert all(
            sum(o.timings[f"{part}_s"] for part in ("text", "denoise", "decode", "encode")) < o.latency_s for o in alone
        )
        assert send_alone(Target(server.target.url, ("nobody's",), native=True), [Kind(1)], first=0)[0].kind == "failed"
        assert {role for _, role, _ in server.said["costs"]} >= {"text", "denoiser", "decoder"}
        assert server.said["engines"] == {"tiny-lcm": "torch"}
    arguments = [str(tiny_lcm.root)]
    with started("diffusers", "fewstep.server.load_diffusers", arguments, threads=1, native=False) as server:
        outcomes, _ = asyncio.run(send_in_turn(server.target, [Kind(1), Kind(4)], at_once=1, first=0))
        assert [o.kind for o in outcomes] == ["ok", "ok"]
    assert asyncio.run(send_in_turn(server.target, [Kind(1)], at_once=1, first=0))[0][0].kind == "failed", "it is gone"


def test_a_server_that_does_not_start_says_why():
    with (
        pytest.raises(EngineUnavailable, match=r"the ours server did not start: .*No module named"),
        started("ours", "fewstep.server.no_such_module", [], threads=1, native=True),
    ):
        pytest.fail("it started")


def test_a_run_says_how_the_speed_of_the_machine_changed():
    assert "was 0.61 to 1.10 of that at the start" in markdown({**REPORT, "speeds": [1.1, 0.61, 1.0]})
    assert "of that at the start" not in markdown(REPORT)


def test_ratios_are_medians_over_rounds_so_that_one_bad_round_decides_nothing():
    """Theirs is 2, 3 and 0.1 times ours; pooled, the round with the long times would decide."""
    rounds = {
        name: [(speed, [Outcome(1, "ok", s, deadline_s=50.0)]) for speed, s in zip((1.0, 0.5, 1.0), times, strict=True)]
        for name, times in ((OURS, (1.0, 2.0, 100.0)), (FIRST_COME, (2.0, 6.0, 10.0)))
    }
    rows = []
    for server, told in rounds.items():
        for workload in ("mixed", "overload"):
            found = in_rounds(told, server=server, rate_per_s=1.0, seconds=2.0)
            rows += [{"workload": workload, "seconds": 6.0, **row} for row in found]
    assert [r["speed"] for r in rows[0]["rounds"]] == [1.0, 0.5, 1.0] and rows[0]["sent"] == 3
    told = {claim["claim"]: claim["found"] for claim in claims(rows, {"overload": 0.5}, None)}
    assert told["mixed: mean latency, ours over first-come"] == pytest.approx(0.5)
    assert told["overload: goodput over capacity"] == pytest.approx(1.0)  # 1, then 2 at half speed, then none in time


def test_rates_and_deadlines_follow_the_speed_of_the_machine(monkeypatch):
    sent = []

    async def traffic(target, arrivals, *, deadline_s, patience_s):
        sent.append((len(arrivals), deadline_s, patience_s))
        return [Outcome(1, "ok", 0.1, deadline_s=deadline_s)]

    monkeypatch.setattr("fewstep.server.load_compare.send_traffic", traffic)
    monkeypatch.setattr("fewstep.server.load_compare._until_idle", lambda *_: None)
    server, speeds = Server(OURS, Target("http://127.0.0.1:1", native=True), {}), iter((1.0, 0.5, 1.0, 0.25))
    rows = _run(
        Plan(("fake",), seconds=50.0), STEADY, [server], {OURS: 10.0}, 0.2, lambda: next(speeds), Numbers(), {OURS: 0.1}
    )
    assert [deadline for _, deadline, _ in sent] == pytest.approx([0.2, 0.4, 0.2, 0.8])
    assert [count / 450 for count, _, _ in sent] == pytest.approx([1.0, 0.5, 1.0, 0.25], rel=0.15)
    assert rows[0]["goodput_per_s"] == pytest.approx(4 / 200)


def test_the_next_round_waits_until_a_server_has_done_what_was_given_up(monkeypatch):
    """Plain diffusers has no way to stop; half of the steady rounds were measured beside its backlog."""
    taken, latencies = [], iter([("ok", 9.0), ("ok", 0.7), ("failed", 0.01), ("ok", 0.45), ("ok", 0.1)])

    def alone(target, kinds, *, first):
        taken.append(first)
        return [Outcome(1, *next(latencies))]

    monkeypatch.setattr("fewstep.server.load_compare.send_alone", alone)
    server, numbers = Server("slow", Target("http://127.0.0.1:1"), {}), Numbers()
    _until_idle(server, 0.1, numbers)
    assert taken == [0, 1, 2, 3] and numbers.used == 4, "a quick failure is no sign of an idle server"
    monkeypatch.setattr("fewstep.server.load_compare.send_alone", lambda *_, **__: [Outcome(1, "ok", 1.0)])
    with pytest.raises(EngineUnavailable, match="the slow server did not become idle"):
        _until_idle(server, 0.1, numbers)


def test_no_number_is_handed_out_twice():
    numbers = Numbers()
    first, second = numbers.take(5), numbers.take(3)
    assert (first, second, numbers.used) == (0, 5, 8)
    arrivals = plan_arrivals(50.0, 1.0, EVEN, seed=0, first=numbers.used)
    assert arrivals[0].number == 8 and [a.number for a in arrivals] == list(range(8, 8 + len(arrivals)))


def test_capacity_is_measured_over_a_long_enough_time():
    with fake_server(delay_s=0.002) as live:
        server = Server("s", Target(live.url, ("fake",), native=True), {})
        began = time.perf_counter()
        per_s = _capacity(Plan(("fake",), seconds=1.0), MIXED, server, Numbers())
        assert time.perf_counter() - began >= 1.0 / 3
        assert 5.0 < per_s < 500.0, "a request is 3 to 6 calls of 2 ms, and calls are shared"
