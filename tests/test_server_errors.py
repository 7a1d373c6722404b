"""Whatever is wrong with a call, the answer is an error in OpenAI's envelope that names the field and the remedy."""

import json
import socket

import httpx
import pytest
from live import Live, fake_server

from fewstep.runtime import errors as runtime_errors
from fewstep.runtime.engines.fake_engine import Fault
from fewstep.runtime.errors import Cancelled, DeadlineExceeded, FewstepError, InvalidRequest, Overloaded
from fewstep.server.errors import TABLE, answer, row_of
from fewstep.server.settings import Settings

MAX_BODY = 100_000


@pytest.fixture(scope="module")
def live():
    with fake_server(Settings(max_body_bytes=MAX_BODY)) as server:
        yield server


def fault(reply: httpx.Response, status: int) -> dict:
    """The error of a reply, after checking the envelope."""
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(reply.json()) == {"error"} and set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["type"] == ("server_error" if status >= 500 else error["type"])
    return error


BOTH = [
    # field sent, its value, param named, part of the message
    ({"stepz": 4}, "stepz", "did you mean steps?"),
    ({"blah_blah": 1}, "blah_blah", "known are prompt"),
    ({"steps": 3}, "steps", "1, 2, 4, 8"),
    ({"steps": 0}, "steps", "steps is 0"),
    ({"steps": "4"}, "steps", "valid integer"),
    ({"steps": 4.0}, "steps", "valid integer"),
    ({"steps": True}, "steps", "valid integer"),
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": "  \n"}, "prompt", "empty"),
    ({"prompt": "x" * 4001}, "prompt", "shorten"),
    ({"prompt": 7}, "prompt", "valid string"),
    ({"prompt": None}, "prompt", "valid string"),
    ({"prompt": ["a"]}, "prompt", "valid string"),
    ({"n": 0}, "n", "1 to 10"),
    ({"n": 11}, "n", "1 to 10"),
    ({"n": 10**30}, "n", "1 to 10"),
    ({"seed": -1}, "seed", "seed is -1"),
    ({"seed": 2**63}, "seed", "seed is 9223372036854775808"),
    ({"seed": "7"}, "seed", "valid integer"),
    ({"guidance": 9.5}, "guidance", "1.0 to 8.0"),
    ({"guidance": "3"}, "guidance", "valid number"),
    ({"negative_prompt": "blue"}, "negative_prompt", "leave it out"),
    ({"model": 3}, "model", "valid string"),
]
IMAGES = [
    ({"size": "63x64"}, "size", "64x64"),
    ({"size": "64"}, "size", "WIDTHxHEIGHT"),
    ({"size": "64x"}, "size", "WIDTHxHEIGHT"),
    ({"size": "-64x64"}, "size", "WIDTHxHEIGHT"),
    ({"size": "6²x64"}, "size", "WIDTHxHEIGHT"),
    ({"size": "9" * 5000 + "x64"}, "size", "WIDTHxHEIGHT"),
    ({"num_inference_steps": 3}, "num_inference_steps", "1, 2, 4, 8"),
    ({"num_inference_steps": 4, "steps": 2}, "num_inference_steps", "send one"),
    ({"guidance_scale": 99.0}, "guidance_scale", "1.0 to 8.0"),
    ({"quality": "ultra"}, "quality", "quality is 'ultra'"),
    ({"quality": "low", "steps": 4}, "quality", "use steps"),
    ({"background": "transparent"}, "background", "opaque"),
    ({"style": "vivid"}, "style", "prompt"),
    ({"output_format": "gif"}, "output_format", "png"),
    ({"output_compression": 50}, "output_compression", "jpeg and webp"),
    ({"output_format": "jpeg", "output_compression": 101}, "output_compression", "0"),
    ({"response_format": "file"}, "response_format", "b64_json"),
    ({"partial_images": 2}, "partial_images", "send stream"),
    ({"partial_images": 4, "stream": True}, "partial_images", "0 to 3"),
    ({"stream": True, "response_format": "url"}, "response_format", "b64_json"),
]
NATIVE = [
    ({"width": 63}, "width", "64x64"),
    ({"height": 100_000}, "height", "64x64"),
    ({"gamma": 0.3}, "gamma", "leave it out"),
    ({"deadline_s": 0}, "deadline_s", "above 0"),
    ({"priority": "high"}, "priority", "valid integer"),
    ({"format": "bmp"}, "format", "png"),
    ({"level": 10}, "level", "0 to 9"),
    ({"format": "jpeg", "level": 0}, "level", "1 to 100"),
    ({"deadline_s": 1e10}, "deadline_s", "at most 1000000 seconds"),
    ({"deadline_ms": 0}, "deadline_ms", "deadline_ms is 0;"),
    ({"deadline_ms": 2e9}, "deadline_ms", "deadline_ms is 2e+09; it must be above 0 and at most 1000000 seconds"),
    ({"deadline_ms": 9, "deadline_s": 1}, "deadline_ms", "send one"),
    ({"guidance_ramp": [0.1]}, "guidance_ramp", "whole below"),
    ({"loras": [{"name": "one"}, {"name": "one"}]}, "loras", "one"),
    ({"loras": [{"name": "one", "wait": 1}]}, "loras.0.wait", "did you mean weight?"),
    ({"times": []}, "times", "times"),
    ({"helper": {"model": "none", "mode": "sideways"}}, "helper.mode", "'pull'"),
    ({"edit": {"image_b64": "AAAA"}}, "edit.image_b64", "PNG"),
    ({"edit": {"image_b64": "http://10.0.0.1/a.png"}}, "edit.image_b64", "fetches none"),
    ({"image_prompt": {"image_b64": "?"}}, "image_prompt.image_b64", "base64"),
    ({"control": "edges"}, "control", "control is 'edges'"),
    ({"control": {}}, "control.image_b64", "required"),
    ({"control": {"image_b64": "", "scal": 1}}, "control.scal", "did you mean scale?"),
    ({"control": {"image_b64": "%%%"}}, "control.image_b64", "base64"),
    ({"control": {"image_b64": "AAAA"}}, "control.image_b64", "PNG"),
    ({"size": "64x64"}, "size", "not a field"),
]
CASES = [
    *(("/v1/images/generations", *case) for case in BOTH + IMAGES),
    *(("/v1/generate", *case) for case in BOTH + NATIVE),
]


@pytest.mark.parametrize(("route", "body", "param", "part"), CASES, ids=lambda value: str(value)[:40])
def test_a_wrong_field_is_named_with_its_remedy(live: Live, route: str, body: dict, param: str, part: str):
    error = fault(live.http.post(route, json={"prompt": "a red circle", **body}), 400)
    assert error["param"] == param
    assert part in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("route", ["/v1/images/generations", "/v1/generate"])
@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"{", "invalid_json"),
        (b"", "missing_required_parameter"),
        (b"[]", "invalid_type"),
        (b'"prompt"', "invalid_type"),
        (b"\xff\xfe", "invalid_json"),
        (b"\x80abc", "invalid_request"),
        (b"[" * 50_000, "invalid_request"),
        (b'{"prompt": "\\ud800"}', "invalid_value"),
        (b'{"prompt": "a", "\\ud800": 1}', "unknown_parameter"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "invalid_request"),
        (b'{"prompt": "a", "guidance": NaN}', "invalid_value"),
        (b'{"prompt": "a", "guidance": Infinity}', "invalid_value"),
        (b"{}", "missing_required_parameter"),
    ],
)
def test_a_broken_body_is_refused(live: Live, route: str, content: bytes, code: str):
    reply = live.http.post(route, content=content, headers={"Content-Type": "application/json"})
    error = fault(reply, 400)
    assert error["code"] == code


@pytest.mark.parametrize(
    ("content", "param"),
    [
        (b'{"prompt": "a", "times": [999, NaN, 10]}', "times"),
        (b'{"prompt": "a", "times": [Infinity, 10]}', "times"),
        (b'{"prompt": "a", "guidance_ramp": [NaN, 1]}', "guidance_ramp"),
        (b'{"prompt": "a", "clip": NaN}', "clip"),
        (b'{"prompt": "a", "deadline_ms": NaN}', "deadline_ms"),
        (b'{"prompt": "a", "deadline_ms": Infinity}', "deadline_ms"),
        (b'{"prompt": "a", "deadline_s": 1e999}', "deadline_s"),
    ],
)
def test_numbers_that_are_none_are_refused(live: Live, content: bytes, param: str):
    reply = live.http.post("/v1/generate", content=content, headers={"Content-Type": "application/json"})
    assert fault(reply, 400)["param"] == param


def test_a_body_that_is_not_declared_json_is_refused(live: Live):
    reply = live.http.post("/v1/generate", content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"})
    assert "application/json" in fault(reply, 400)["message"]


@pytest.mark.parametrize("route", ["/v1/images/generations", "/v1/generate"])
def test_an_unknown_model_is_404_and_lists_the_models(live: Live, route: str):
    error = fault(live.http.post(route, json={"prompt": "a", "model": "dall-e-3"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "fake" in error["message"]


def test_unknown_routes_and_methods_use_the_envelope(live: Live):
    assert fault(live.http.get("/nothing"), 404)["code"] == "not_found"
    assert fault(live.http.get("/page/nothing.js"), 404)["code"] == "not_found"
    reply = live.http.get("/v1/images/generations")
    assert fault(reply, 405)["code"] == "method_not_allowed"
    assert reply.headers["allow"] == "POST"
    assert fault(live.http.get("/v1/models/none"), 404)["code"] == "model_not_found"


def test_a_body_too_large_is_413(live: Live):
    error = fault(live.generate(prompt="x" * 3_000_000), 413)
    assert error["code"] == "body_too_large" and str(MAX_BODY) in error["message"]


def test_a_chunked_body_too_large_is_413_too(live: Live):
    def chunks():
        yield b'{"prompt": "'
        for _ in range(100):
            yield b"x" * 10_000
        yield b'"}'

    reply = live.http.post("/v1/generate", content=chunks(), headers={"Content-Type": "application/json"})
    assert "content-length" not in reply.request.headers
    assert fault(reply, 413)["code"] == "body_too_large"


def test_an_endless_body_is_cut_off(live: Live):
    with socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2])), timeout=20) as client:
        client.sendall(b"POST /v1/generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        client.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
        chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        sent = 0
        try:
            while sent < 200 * 2**20:
                client.sendall(chunk)
                sent += len(chunk)
        except OSError:
            pass
    assert sent < 100 * 2**20
    assert live.http.get("/health").status_code == 200


def test_nan_fails_its_own_request_and_the_next_one_succeeds():
    with fake_server(faults={("denoiser", 9): Fault("nan")}) as live:
        while len([c for c in live.engine.calls if c.role == "denoiser"]) < 9:
            assert live.generate(steps=1).status_code == 200
        failed = live.images(steps=1)
        error = fault(failed, 500)
        assert (error["type"], error["code"]) == ("server_error", "engine_failed")
        assert live.images(steps=1).status_code == 200


def test_an_engine_error_fails_its_own_request_and_the_next_one_succeeds():
    with fake_server(faults={("decoder", 3): Fault("fail")}) as live:
        replies = [live.images(steps=1) for _ in range(6)]
        assert sorted({reply.status_code for reply in replies}) == [200, 500]
        assert [reply.status_code for reply in replies].count(500) == 1
        assert replies[-1].status_code == 200


def test_an_unforeseen_error_is_500_without_its_details(live: Live, monkeypatch: pytest.MonkeyPatch):
    def broken(*_, **__):
        raise RuntimeError("secret detail")

    monkeypatch.setattr(live.runtime, "submit", broken)
    reply = live.images()
    error = fault(reply, 500)
    assert error["code"] == "internal_error" and "secret" not in json.dumps(error)
    assert reply.headers["connection"] == "close", "a client must not send its next request into a closing connection"


def test_overload_is_429_with_retry_after(live: Live, monkeypatch: pytest.MonkeyPatch):
    def full(*_, **__):
        raise Overloaded("the queue is full", retry_after_s=2.3)

    monkeypatch.setattr(live.runtime, "submit", full)
    reply = live.images()
    assert fault(reply, 429)["type"] == "rate_limit_error"
    assert reply.headers["retry-after"] == "3"


def test_the_table_covers_every_runtime_error_and_never_says_409():
    declared = {getattr(runtime_errors, name) for name in runtime_errors.__all__}
    assert declared <= set(TABLE)
    assert 409 not in {row.status for row in TABLE.values()}
    assert all(row.type == "server_error" for row in TABLE.values() if row.status >= 500)


def test_the_table_prefers_the_most_exact_row():
    class Narrow(DeadlineExceeded):
        pass

    assert row_of(Narrow("late")).status == 504
    assert row_of(FewstepError("?")).status == 500
    assert row_of(KeyError("?")).code == "internal_error"


def test_errors_that_will_repeat_tell_clients_not_to_retry():
    assert answer(DeadlineExceeded("late"))[2] == {"x-should-retry": "false"}
    assert answer(Cancelled("gone"))[0] == 499
    assert answer(InvalidRequest("n", "n is 0"))[2] == {}
