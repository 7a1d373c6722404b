"""What /ready says of a server: a queue that is full while it warms, faults of any kind, a runtime that has stopped."""

import pytest
from live import fake_server, until

from fewstep.runtime.errors import Overloaded
from fewstep.runtime.service.local import Runtime
from fewstep.server import health


def verdict(live) -> tuple[int, str, str]:
    reply = live.http.get("/ready")
    error = reply.json().get("error", {})
    return reply.status_code, error.get("code", ""), error.get("message", "")


def test_a_runtime_that_has_stopped_is_not_ready():
    """Its engine thread ended on a fault of ours: requests get 503, and no more of them should come here."""

    def broken(*_):
        raise AssertionError("a bug")

    with fake_server() as live:
        assert verdict(live) == (200, "", "")
        live.runtime._serving.scheduler.complete = broken
        assert live.generate(steps=1).status_code == 500
        status, code, said = verdict(live)
        assert (status, code) == (503, "failed") and "restart the server" in said
        assert live.generate(steps=1).status_code == 503
        assert live.http.get("/health").status_code == 200
        assert "fewstep_ready 0.0" in live.http.get("/metrics").text


@pytest.fixture
def crowded(monkeypatch):
    """A runtime whose queue is full at each model's first requests: how often, and what came of them."""
    left, seen = [3], []
    submit = Runtime.submit

    def full(runtime, request, *rest, **options):
        if request.prompt == "warm up" and left[0] > 0:
            left[0] -= 1
            seen.append(request.prompt)
            raise Overloaded("1 requests are waiting; try again in 0.01 s", 0.01)
        return submit(runtime, request, *rest, **options)

    monkeypatch.setattr(Runtime, "submit", full)
    return left, seen


def test_a_full_queue_is_not_a_failed_warm_up(crowded):
    _, seen = crowded
    with fake_server() as live:
        assert verdict(live)[0] == 200
    assert len(seen) == 3


def test_a_queue_that_stays_full_is_one_in_the_end(crowded, monkeypatch):
    left, seen = crowded
    left[0] = 10**9
    monkeypatch.setattr(health, "WARM_WAIT_S", 0.1)
    with fake_server(wait=False) as live:
        until(lambda: verdict(live)[1] == "failed")
        assert "try again in" in verdict(live)[2] and 2 <= len(seen) < 1000


def test_a_warm_up_that_breaks_in_any_way_is_said(monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(Runtime, "submit", broken)
    with fake_server(wait=False) as live:
        until(lambda: verdict(live)[1] == "failed")
        assert "the warm-up of fake failed: RuntimeError('no such kernel')" in verdict(live)[2]
    assert "Traceback" in caplog.text


def test_a_stopped_runtime_is_still_draining_while_the_server_is():
    with fake_server() as live:
        live.app.state.service.health.drain()
        live.runtime.close()
        assert verdict(live)[1] == "draining"
