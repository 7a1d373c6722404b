"""What is written down of a call: log lines without secrets, traces with the right parents, and metrics."""

import io
import json
import logging

import pytest
from live import fake_server
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client.parser import text_string_to_metric_families

from fewstep.runtime.engines.fake_engine import Fault
from fewstep.server import app as app_module
from fewstep.server.logs import JsonLines, configure
from fewstep.server.settings import BadSetting, Settings
from fewstep.server.traces import Traces

SECRET = "the words of a prompt"


@pytest.fixture
def lines():
    """The log of this process as JSON objects, read when called."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("fewstep")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    logger.removeHandler(handler)
    logger.setLevel(before)


def test_every_call_is_one_line_with_its_request_id_and_times(lines):
    with fake_server(Settings(api_keys=("a-secret-key",))) as live:
        headers = {"Authorization": "Bearer a-secret-key", "x-request-id": "mine"}
        body = {"prompt": SECRET, "steps": 4, "n": 2}
        assert live.http.post("/v1/generate?token=hidden", json=body, headers=headers).status_code == 200
    (line,) = [line for line in lines() if line.get("request_id") == "mine"]
    assert (line["method"], line["path"], line["route"]) == ("POST", "/v1/generate", "/v1/generate")
    assert (line["status"], line["model"], line["steps"], line["pictures"]) == (200, "fake", 4, 2)
    assert line["key"] == "key-1"
    assert line["level"] == "info" and line["time"].endswith("Z") and line["ticket"]
    parts = [line[f"{stage}_ms"] for stage in ("queue", "text", "denoise", "decode", "encode")]
    assert all(part >= 0 for part in parts) and line["duration_ms"] > 0
    assert not [word for word in (SECRET, "a-secret-key", "hidden") if word in json.dumps(lines())]


def test_refused_and_broken_calls_are_lines_too(lines, monkeypatch):
    def broken(self):
        raise RuntimeError("a fault of ours")

    with fake_server(Settings(api_keys=("k",))) as live:
        monkeypatch.setattr(app_module.Health, "check", broken)
        assert live.http.get("/v1/models").status_code == 401
        reply = live.http.get("/ready", headers={"x-request-id": "broken-1"})
        assert reply.status_code == 500 and reply.headers["x-request-id"] == "broken-1"
        assert "a fault of ours" not in reply.text
        page = live.http.get("/metrics").text
    assert {"/v1/models", "/ready"} <= {line["path"] for line in lines() if "path" in line}
    (fault,) = [line for line in lines() if line["level"] == "error"]
    assert fault["request_id"] == "broken-1" and "a fault of ours" in fault["exception"]
    assert 'fewstep_http_responses_total{route="/ready",status="500"} 1.0' in page


def test_styles_decide_what_reaches_stderr(capsys):
    loggers = [logging.getLogger(name) for name in ("fewstep", "uvicorn")]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    try:
        for style in ("quiet", "text", "json"):
            configure(style)
            logging.getLogger("fewstep.server").info("a call")
            logging.getLogger("fewstep.server").error("a fault")
        written = capsys.readouterr().err.splitlines()
    finally:
        for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
    assert [line.count("a call") for line in written] == [0, 1, 0, 1, 0]
    assert json.loads(written[3])["message"] == "a call" and json.loads(written[4])["level"] == "error"


@pytest.fixture
def spans(monkeypatch):
    """The spans of a server, once it has been closed."""
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(app_module, "Traces", lambda: Traces(exporter))
    return exporter.get_finished_spans


def test_a_trace_continues_the_callers_and_has_the_stages_under_it(spans):
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with fake_server(Settings(traces="otlp"), delay_s=0.01) as live:
        headers = {"traceparent": f"00-{trace}-{parent}-01"}
        reply = live.http.post("/v1/generate", json={"prompt": SECRET, "steps": 4}, headers=headers)
        timings = reply.json()["timings"]
    found = [span for span in spans() if f"{span.context.trace_id:032x}" == trace]
    by_name = {span.name: span for span in found}
    assert set(by_name) == {"POST /v1/generate", "queue", "run", "encode"}
    server = by_name["POST /v1/generate"]
    assert server.kind is SpanKind.SERVER and f"{server.parent.span_id:016x}" == parent
    assert server.attributes["http.response.status_code"] == 200
    for name in ("queue", "run", "encode"):
        child = by_name[name]
        assert child.parent.span_id == server.context.span_id
        assert server.start_time - 1e6 <= child.start_time <= child.end_time <= server.end_time
    run = by_name["run"]
    assert run.attributes["fewstep.denoise_s"] == timings["denoise_s"] and run.attributes["fewstep.steps"] == 4
    ran_s = timings["total_s"] - timings["encode_s"] - timings["queue_s"]
    assert (run.end_time - run.start_time) / 1e9 == pytest.approx(ran_s, abs=1e-6)
    assert SECRET not in str([dict(span.attributes) for span in found])


def test_a_fault_of_the_server_is_an_error_and_a_callers_is_not(spans):
    with fake_server(Settings(traces="otlp"), faults={("decoder", 1): Fault("fail")}) as live:
        assert live.generate(steps=1).status_code == 500
        assert live.generate(steps=3).status_code == 400
    status = [s.status.status_code for s in spans() if s.name == "POST /v1/generate"]
    assert status == [StatusCode.ERROR, StatusCode.UNSET]


def test_without_the_packages_traces_say_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(BadSetting, match=r"pip install 'fewstep\[otel\]'"):
        Traces()


def test_overhead_is_what_neither_engine_nor_encoder_took():
    with fake_server(delay_s=0.05) as live:
        assert live.generate(steps=4).status_code == 200
        samples = {
            sample.name: sample.value
            for family in text_string_to_metric_families(live.http.get("/metrics").text)
            for sample in family.samples
            if sample.name.startswith("fewstep_http_overhead") and not sample.labels
        }
    assert samples["fewstep_http_overhead_seconds_count"] == 1
    assert 0 < samples["fewstep_http_overhead_seconds_sum"] < 0.1, "the engine's 0.25 s are not in it"
