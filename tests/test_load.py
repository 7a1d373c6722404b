"""The load command: a plan that is Poisson, rows that add up, and traffic that stays on this machine."""

import json
import math
import statistics

import pytest
from live import fake_server

from fewstep.runtime.errors import InvalidRequest
from fewstep.runtime.request import Limits
from fewstep.server.load import Outcome, check_loopback, command, plan_arrivals, summarise

ROW = {"server", "rate_per_s", "steps", "sent", "ok", "rejected", "failed", "p50_ms", "p95_ms", "p99_ms"}
ROW |= {"goodput_per_s", "deadline_missed"}


def test_arrivals_are_a_poisson_process():
    arrivals = plan_arrivals(50.0, 100.0, [1, 2, 4], seed=0)
    times = [arrival.at_s for arrival in arrivals]
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert times == sorted(times) and times[-1] < 100.0
    assert abs(len(arrivals) - 5000) < 5 * math.sqrt(5000)
    assert statistics.stdev(gaps) == pytest.approx(statistics.mean(gaps), rel=0.1)  # exponential gaps
    assert {arrival.steps for arrival in arrivals} == {1, 2, 4}
    assert arrivals == plan_arrivals(50.0, 100.0, [1, 2, 4], seed=0) != plan_arrivals(50.0, 100.0, [1, 2, 4], seed=1)


def test_rows_add_up():
    outcomes = [Outcome(1, "ok", k / 100) for k in range(1, 101)]
    outcomes += [Outcome(4, "ok", 3.0), Outcome(4, "rejected", 0.01), Outcome(4, "failed", 60.0)]
    one, four, both = summarise(outcomes, server="ours", rate_per_s=5.0, seconds=20.0, deadline_s=0.5)
    assert set(one) == ROW
    assert (one["steps"], one["sent"], one["ok"]) == (1, 100, 100)
    assert [one["p50_ms"], one["p95_ms"], one["p99_ms"]] == pytest.approx([500.0, 950.0, 990.0])
    assert (one["goodput_per_s"], one["deadline_missed"]) == (2.5, 50)
    assert (four["sent"], four["ok"], four["rejected"], four["failed"], four["deadline_missed"]) == (3, 1, 1, 1, 1)
    assert both["steps"] == "all" and both["sent"] == 103 and both["p99_ms"] == pytest.approx(1000.0)


def test_without_a_picture_there_is_no_percentile():
    (row,) = summarise([Outcome(4, "failed", 1.0)], server="s", rate_per_s=1.0, seconds=1.0, deadline_s=1.0)
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
