"""The server around the routes: health, readiness, drain, keys, metrics, links, settings, and callers who hang up."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from live import Live, fake_server, until
from prometheus_client.parser import text_string_to_metric_families

from fewstep.runtime.engines.fake_engine import Fault
from fewstep.runtime.sampling.request import Limits
from fewstep.server.errors import Refused
from fewstep.server.pictures import Store
from fewstep.server.settings import BadSetting, Settings


@pytest.fixture(scope="module")
def live():
    with fake_server() as server:
        yield server


def samples(live: Live) -> dict[str, float]:
    page = live.http.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(page.text):
        for sample in family.samples:
            found[sample.name + "".join(f"|{value}" for _, value in sorted(sample.labels.items()))] = sample.value
    return found


def test_models_are_listed_as_openai_does(live: Live):
    listed = live.http.get("/v1/models").json()
    assert listed["object"] == "list"
    (card,) = listed["data"]
    assert (card["id"], card["object"], card["owned_by"]) == ("fake", "model", "fewstep")
    assert abs(card["created"] - time.time()) < 600
    assert live.http.get("/v1/models/fake").json() == card


def test_the_schema_names_every_route(live: Live):
    paths = live.http.get("/openapi.json").json()["paths"]
    assert {"/v1/images/generations", "/v1/generate", "/v1/models", "/v1/info", "/health", "/ready"} <= set(paths)


def test_metrics_count_requests_stages_batches_and_responses(live: Live):
    before = samples(live)
    assert live.generate(steps=4, n=2, prompt="never seen").status_code == 200
    assert live.generate(steps=3).status_code == 400
    after = samples(live)
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    assert grown["fewstep_requests_total|Finished"] == 1
    assert grown["fewstep_pictures_total"] == 2
    assert grown["fewstep_stage_seconds_count|text"] == 1
    assert grown["fewstep_stage_seconds_count|file"] == 1 and grown["fewstep_stage_seconds_count|encode"] == 0
    assert grown["fewstep_stage_seconds_bucket|+Inf|denoise"] == grown["fewstep_batch_size_count|denoise"] >= 4
    assert grown["fewstep_batch_size_sum|denoise"] == 8
    assert grown["fewstep_http_responses_total|/v1/generate|200"] == 1
    assert grown["fewstep_http_responses_total|/v1/generate|400"] == 1
    assert after["fewstep_ready"] == 1 and after["fewstep_requests_live"] == 0
    assert after["fewstep_request_seconds_count"] >= 1 and after["fewstep_queue_seconds_count"] >= 1


def test_a_reply_does_not_wait_for_an_acknowledgement(live: Live):
    """With Nagle's algorithm on, no reply comes in under 40 ms."""
    times = []
    for _ in range(20):
        began = time.perf_counter()
        live.http.get("/health")
        times.append(time.perf_counter() - began)
    assert min(times) < 0.03


def test_two_apps_in_one_process_count_apart(live: Live):
    with fake_server() as other:
        assert live.generate(steps=1).status_code == 200
        assert samples(other)["fewstep_http_responses_total|/ready|200"] >= 1
        assert "fewstep_http_responses_total|/v1/generate|200" not in samples(other)


def test_ready_only_after_the_warm_up():
    gate = threading.Event()
    with fake_server(wait=False, before=lambda _: gate.wait(10)) as live:
        assert live.http.get("/health").json() == {"status": "ok"}
        reply = live.http.get("/ready")
        assert reply.status_code == 503 and reply.json()["error"]["code"] == "warming"
        assert samples(live)["fewstep_ready"] == 0
        gate.set()
        until(lambda: live.http.get("/ready").status_code == 200)
        assert live.http.get("/ready").json() == {"status": "ready"}


def test_a_failed_warm_up_is_said_at_ready():
    with fake_server(wait=False, faults={("decoder", k): Fault("fail") for k in range(9)}) as live:
        until(lambda: live.http.get("/ready").json()["error"]["code"] == "failed")
        assert "told to fail" in live.http.get("/ready").json()["error"]["message"]
        assert live.http.get("/health").status_code == 200


def test_draining_is_not_ready_but_still_serves(live: Live):
    with fake_server() as live:
        live.app.state.service.health.drain()
        reply = live.http.get("/ready")
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "draining")
        assert reply.headers["retry-after"] == "1"
        assert live.generate(steps=1).status_code == 200


def test_a_closed_runtime_answers_503(live: Live):
    with fake_server() as live:
        live.runtime.close()
        reply = live.images()
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "shutting_down")
        assert reply.headers["retry-after"] == "1"


def test_a_full_queue_answers_429_and_recovers():
    with fake_server(limits=Limits(max_queue=2), delay_s=0.1) as live:
        replies: list[httpx.Response] = []

        def one() -> None:
            with httpx.Client(base_url=live.url, trust_env=False, timeout=20) as http:
                replies.append(http.post("/v1/generate", json={"prompt": "a", "steps": 4}))

        threads = [threading.Thread(target=one) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        refused = [reply for reply in replies if reply.status_code == 429]
        assert refused and len(refused) < 8
        assert {reply.status_code for reply in replies} == {200, 429}
        assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
        assert live.generate(steps=1).status_code == 200


def test_keys_guard_the_api_and_nothing_else():
    with fake_server(Settings(api_keys=("first", "second"))) as live:
        for path in ("/", "/health", "/ready", "/metrics", "/page/page.js"):
            assert live.http.get(path).status_code == 200
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "first"},
            {"Authorization": "Basic first"},
        ):
            reply = live.http.post("/v1/generate", json={"prompt": "a"}, headers=headers)
            assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
            assert reply.headers["www-authenticate"] == "Bearer"
            assert live.http.get("/v1/models", headers=headers).status_code == 401
        for key in ("first", "second"):
            assert live.http.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200


def test_a_refused_key_is_refused_before_the_body_is_read():
    with fake_server(Settings(api_keys=("key",))) as live:
        assert live.http.post("/v1/generate", content=b"{ not json").status_code == 401


def test_a_link_gives_the_picture_until_the_store_is_full():
    with fake_server(Settings(stored_bytes=10_000)) as live:
        first = live.images(response_format="url", seed=1).json()["data"][0]["url"]
        assert first.startswith(live.url + "/pictures/")
        kept = live.http.get(first)
        assert (kept.status_code, kept.headers["content-type"]) == (200, "image/png")
        assert kept.content.startswith(b"\x89PNG")
        for seed in range(12):
            live.images(response_format="url", seed=seed, n=2, steps=1)
        gone = live.http.get(first)
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "not_found")


def test_the_store_keeps_within_its_bytes_and_time():
    store = Store(max_bytes=10, keep_s=5.0)
    a, b = store.put(b"aaaa", "png", 0.0), store.put(b"bbbbb", "png", 1.0)
    assert (store.get(a, 2.0), store.get(b, 2.0)) == (b"aaaa", b"bbbbb")
    c = store.put(b"cc", "png", 3.0)
    with pytest.raises(Refused, match="no longer kept"):
        store.get(a, 3.0)
    assert store.get(b, 3.0) == b"bbbbb"
    with pytest.raises(Refused):
        store.get(b, 6.0)
    assert store.get(c, 7.9) == b"cc"
    with pytest.raises(Refused, match="b64_json"):
        store.put(b"x" * 11, "png", 8.0)


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_a_caller_who_hangs_up_leaves_the_queue_within_one_step(accept: str):
    with fake_server(delay_s=0.15) as live:
        began = len(live.engine.calls)
        body = b'{"prompt": "a caller who leaves", "steps": 8}'
        head = f"POST /v1/generate HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\nContent-Type: application/json\r\n"
        client = socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2])))
        client.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: sum(call.role == "denoiser" for call in live.engine.calls[began:]) == 2)
        client.close()
        until(lambda: live.runtime.metrics().live == 0)
        time.sleep(0.4)
        roles = [call.role for call in live.engine.calls[began:]]
        assert roles.count("denoiser") <= 3 and "decoder" not in roles
        assert live.runtime.metrics().failed == {"Cancelled": 1}
        assert live.generate(steps=1).status_code == 200


def test_promises_leave_time_for_what_replies_took_of_late(monkeypatch):
    with fake_server() as live:
        account, asked, submit = live.app.state.service.account, [], live.runtime.submit
        assert account.reply_s == 0.0
        monkeypatch.setattr(live.runtime, "submit", lambda *a, reply_s: (asked.append(reply_s), submit(*a))[1])
        for _ in range(3):
            assert live.generate(steps=1).status_code == 200
        assert asked[0] == 0.0 and 0.0 < asked[2] < 1.0 and account.reply_s > 0.0
        assert live.generate(steps=99).status_code == 400
        until(lambda: len(account._after) == 3)


def test_sigterm_finishes_what_runs_and_exits_with_0(tiny_lcm):
    code = "import sys; from fewstep.server.commands import serve; sys.exit(serve(sys.argv[1:]))"
    arguments = [str(tiny_lcm.root), "--port", "0", "--engine", "torch"]
    environment = {**os.environ, "FEWSTEP_DRAIN_DELAY_S": "0.5"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    with process:
        try:
            line = process.stdout.readline()
            assert line.startswith("fewstep serves tiny-lcm at http://127.0.0.1:"), line
            url = line.split()[4]
            assert process.stdout.readline().startswith("ready: tiny-lcm on torch")
            with httpx.Client(base_url=url, trust_env=False, timeout=20) as http:
                assert http.get("/ready").status_code == 200
                process.send_signal(signal.SIGTERM)
                until(lambda: http.get("/ready").status_code == 503)
                reply = http.post("/v1/generate", json={"prompt": "a", "steps": 8, "n": 4})
                assert reply.status_code == 200 and len(reply.json()["pictures"]) == 4
            assert process.wait(20) == 0
            assert process.stdout.read() == ""
        finally:
            process.kill()


SLOW = """
import asyncio, sys
from fewstep.runtime.engines.fake_engine import FakeEngine, fake_bundle
from fewstep.runtime.service.local import Runtime
from fewstep.server.app import create_app
from fewstep.server.commands import listen, run
from fewstep.server.settings import Settings

settings = Settings(drain_delay_s=20.0)
with listen("127.0.0.1", 0) as listener, Runtime([fake_bundle()], engines={"fake": FakeEngine(delay_s=0.2)}) as runtime:
    sys.exit(asyncio.run(run(create_app(runtime, settings), settings, listener)))
"""


def test_a_second_signal_ends_at_once():
    with subprocess.Popen([sys.executable, "-c", SLOW], stdout=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().split()[4]
            assert process.stdout.readline().startswith("ready")
            with httpx.Client(base_url=url, trust_env=False, timeout=20) as http:
                process.send_signal(signal.SIGTERM)
                until(lambda: http.get("/ready").status_code == 503)
                began = time.monotonic()
                process.send_signal(signal.SIGTERM)
                assert process.wait(20) == 0
                assert time.monotonic() - began < 10
        finally:
            process.kill()


def test_serve_says_a_busy_port_before_it_loads_a_model():
    from fewstep.server.commands import serve

    with socket.create_server(("127.0.0.1", 0)) as taken:
        flags = ["no-such-bundle", "--port", str(taken.getsockname()[1])]
        with pytest.raises(BadSetting, match="choose another --host or --port"):
            serve(flags)


def test_settings_come_from_the_environment():
    settings = Settings.from_environment(
        {"FEWSTEP_PORT": "9000", "FEWSTEP_API_KEYS": "a, b,", "FEWSTEP_DRAIN_S": "1.5", "PATH": "/bin"}
    )
    assert (settings.port, settings.api_keys, settings.drain_s) == (9000, ("a", "b"), 1.5)
    assert settings.host == "127.0.0.1"


@pytest.mark.parametrize("value", ["1", "true", "yes", "on", "0", "false", "no", "off"])
def test_a_switch_is_on_or_off_in_so_many_words(value: str):
    for text in (value, value.upper(), f" {value} "):
        settings = Settings.from_environment({"FEWSTEP_ALLOW_UNPROVEN": text})
        assert settings.allow_unproven is (value in ("1", "true", "yes", "on"))


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("FEWSTEP_PORT", "eighty", "whole number"),
        ("FEWSTEP_PORT", "70000", "0 to 65535"),
        ("FEWSTEP_PORT", "8e3", "whole number"),
        ("FEWSTEP_DRAIN_S", "nan", "number of seconds"),
        ("FEWSTEP_MAX_QUEUE", "0", "1 to 1000000"),
        ("FEWSTEP_HOST", " ", "unset it"),
        ("FEWSTEP_ALLOW_UNPROVEN", "maybe", "'maybe'; use 1, true, yes or on"),
        ("FEWSTEP_ALLOW_UNPROVEN", "", "0, false, no or off"),
        ("FEWSTEP_ALLOW_UNPROVEN", "2", "use 1"),
        ("FEWSTEP_API_KEY", "secret", "did you mean FEWSTEP_API_KEYS"),
    ],
)
def test_a_bad_setting_is_named_with_its_value_and_remedy(key: str, value: str, part: str):
    with pytest.raises(BadSetting) as caught:
        Settings.from_environment({key: value})
    assert key in str(caught.value) and part in str(caught.value)
    assert "secret" not in str(caught.value)
