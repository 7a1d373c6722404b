"""The live socket: the latest frame wins, a closed socket ends its work, and whoever is refused is told why."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
from live import Live, fake_server, until
from PIL import Image
from websocket import WebSocket, create_connection

from fewstep.runtime.engines.fake_engine import Call, Fault
from fewstep.server.live_frame import write_message
from fewstep.server.settings import Settings


@pytest.fixture(scope="module")
def live():
    with fake_server(Settings(max_body_bytes=50_000)) as server:
        yield server


@contextmanager
def opened(live: Live, *, ready: bool = True, **options) -> Iterator[WebSocket]:
    socket = create_connection(live.url.replace("http", "ws") + "/v1/live", timeout=20, **options)
    try:
        if ready:
            assert json.loads(socket.recv())["type"] == "ready"
        yield socket
    finally:
        socket.close()
        socket.shutdown()  # `close` leaves a socket open that the server has closed


@contextmanager
def held_server() -> Iterator[tuple[Live, threading.Event]]:
    """A server whose denoiser, once warm, waits for the event."""
    gate = threading.Event()

    def wait(call: Call) -> None:
        if call.role == "denoiser" and call.number >= 4:
            gate.wait(20)

    with fake_server(before=wait) as live:
        try:
            yield live, gate
        finally:
            gate.set()


def frame(number: int = 0, picture: bytes = b"", **fields) -> bytes:
    return write_message({"frame": number, "prompt": "a red circle", "seed": 1, **fields}, picture)


def drawing(level: int = 255, size: tuple[int, int] = (64, 64), form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (level, level, level)).save(file, form)
    return file.getvalue()


def heard(socket: WebSocket, kind: str) -> tuple[dict, bytes]:
    """The next message of a kind: its header and its picture."""
    while True:
        message = socket.recv()
        text, _, picture = message.partition(b"\n") if isinstance(message, bytes) else (message, "", b"")
        header = json.loads(text)
        if header["type"] == kind:
            return header, picture
        assert header["type"] == "started", header


def refusal(socket: WebSocket) -> dict:
    return heard(socket, "failed")[0]["error"]


def pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int)


def test_a_frame_of_words_becomes_the_same_picture_as_by_http(live: Live):
    with opened(live) as socket:
        socket.send(json.dumps({"frame": 7, "prompt": "a red circle", "seed": 3, "steps": 2, "format": "png"}))
        header, picture = heard(socket, "picture")
    reply = live.generate(seed=3, steps=2).json()
    assert (header["frame"], header["seed"], header["steps"], header["nfe"], header["model"]) == (7, 3, 2, 2, "fake")
    assert (header["width"], header["height"], header["format"], header["dropped"]) == (64, 64, "png", 0)
    assert set(header["timings"]) == set(reply["timings"])
    assert (pixels(picture) == pixels(base64.b64decode(reply["pictures"][0]["b64"]))).all()


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_a_drawing_steers_the_picture_in_every_format(live: Live, form: str):
    pictures = []
    with opened(live) as socket:
        for level in (0, 255):
            socket.send_binary(frame(level, drawing(level, form=form.upper()), control={"scale": 1.0}, format=form))
            header, picture = heard(socket, "picture")
            assert header["frame"] == level
            assert Image.open(io.BytesIO(picture)).format == form.upper()
            pictures.append(pixels(picture))
    assert abs(pictures[0] - pictures[1]).mean() > 1


def test_the_latest_frame_wins_and_the_dropped_are_counted():
    with held_server() as (live, gate):
        with opened(live) as socket:
            for number in range(12):
                socket.send_binary(frame(number, steps=1))
                if number == 0:
                    assert heard(socket, "started")[0] == {"type": "started", "frame": 0, "ahead": 0, "dropped": 0}
            until(lambda: 'outcome="dropped"} 10.0' in live.http.get("/metrics").text)
            gate.set()
            assert heard(socket, "picture")[0]["frame"] == 0
            header, _ = heard(socket, "picture")
            assert (header["frame"], header["dropped"]) == (11, 10)
        assert 'fewstep_live_frames_total{outcome="made"} 2.0' in live.http.get("/metrics").text


def test_a_frame_may_replace_the_one_in_the_making():
    with held_server() as (live, gate):
        with opened(live) as socket:
            socket.send_binary(frame(0, steps=4))
            heard(socket, "started")
            socket.send_binary(frame(1, steps=1, replace=True))
            assert heard(socket, "started")[0]["frame"] == 1  # the first has been given up
            gate.set()
            header, _ = heard(socket, "picture")
        assert (header["frame"], header["dropped"]) == (1, 1)
        until(lambda: live.runtime.metrics().live == 0)
        assert live.runtime.metrics().failed == {"Cancelled": 1}


def test_as_many_frames_are_in_the_making_at_once_as_asked():
    with held_server() as (live, gate), opened(live) as socket:
        for number in (1, 2):
            socket.send_binary(frame(number, steps=4, depth=2, priority=8 - 4 * number))
            assert heard(socket, "started")[0]["frame"] == number, "the second does not wait for the first"
        for number in (3, 4):
            socket.send_binary(frame(number, steps=4, depth=2, priority=8 - 4 * number))  # none passes an earlier one
        until(lambda: 'outcome="dropped"} 1.0' in live.http.get("/metrics").text)
        assert live.runtime.metrics().live == 2
        gate.set()
        shown = [heard(socket, "picture")[0] for _ in range(3)]
        assert [header["frame"] for header in shown] == [1, 2, 4], "of those that waited, the newest"
        assert shown[-1]["dropped"] == 1


def test_all_frames_in_the_making_may_be_replaced():
    with held_server() as (live, gate), opened(live) as socket:
        for number in (1, 2):
            socket.send_binary(frame(number, depth=2))
            heard(socket, "started")
        socket.send_binary(frame(3, depth=2, replace=True))
        assert heard(socket, "started")[0]["frame"] == 3
        gate.set()
        header = heard(socket, "picture")[0]
        assert (header["frame"], header["dropped"]) == (3, 2)


def test_a_closed_socket_ends_its_work():
    with held_server() as (live, gate):
        with opened(live) as socket:
            socket.send_binary(frame(0, steps=8))
            heard(socket, "started")
            assert "fewstep_live_sessions 1.0" in live.http.get("/metrics").text
        until(lambda: "fewstep_live_sessions 0.0" in live.http.get("/metrics").text)
        gate.set()
        until(lambda: live.runtime.metrics().live == 0)
        assert live.runtime.metrics().failed["Cancelled"] == 1
        calls = sum(call.role == "denoiser" for call in live.engine.calls)
        assert calls in (4, 5), "four to warm the engine, and one at most of eight: it may have ended before its first"


@pytest.mark.parametrize(
    ("message", "param", "said"),
    [
        (b"not json", None, "the body is not JSON"),
        (b"[]\n", None, "must be a JSON object"),
        (b"\xff\xfe", None, "the body is not JSON"),
        (b"[" * 20_000, None, "recursion depth"),
        (b'{"prompt": "a"}', "frame", "frame is missing"),
        (frame(stepz=4), "stepz", "did you mean steps?"),
        (frame(steps=3), "steps", "1, 2, 4, 8"),
        (frame(steps="4"), "steps", "valid integer"),
        (frame(n=2), "n", "one picture"),
        (frame(prompt=" "), "prompt", "prompt is empty"),
        (frame(model="nobody"), "model", "this server has fake"),
        (frame(width=63), "width", "63x64 is not supported"),
        (frame(control={}), "control.image_b64", "control.image_b64 is missing"),
        (frame(picture=b"x"), "picture", "neither control nor edit waits"),
        (frame(picture=b"x", control={}), "control.image_b64", "not a PNG, JPEG or WebP"),
        (frame(picture=drawing(size=(32, 32)), control={}), "control.image_b64", "must be (64, 64, 3)"),
        (frame(picture=drawing(size=(640, 640)), control={}), "control.image_b64", "at most 4096 pixels"),
        (frame(picture=drawing(), control={"scale": 3.0}), "control.scale", "use 0 to 2"),
        (frame(picture=drawing(), control={"scal": 1.0}), "control.scal", "did you mean scale?"),
        (frame(similar=0.98), "similar", "the frame has no picture"),
        (frame(similar=1.0, picture=drawing(), edit={}), "similar", "less than 1"),
        (b"x" * 50_001, None, "above 50000 bytes"),
    ],
)  # fmt: skip
def test_a_bad_frame_is_answered_in_words_and_the_session_goes_on(live: Live, message, param, said):
    with opened(live) as socket:
        socket.send_binary(message)
        error = refusal(socket)
        assert (error["param"], error["type"]) == (param, "invalid_request_error") and said in error["message"]
        socket.send_binary(frame(1, steps=1))
        assert heard(socket, "picture")[0]["frame"] == 1


def test_frames_that_show_nothing_new_are_skipped_only_where_asked_and_only_while_the_picture_stands():
    with fake_server() as live, opened(live) as socket:

        def kind(number: int, level: int, **fields) -> str:
            socket.send_binary(frame(number, drawing(level), **{"edit": {"strength": 0.5}, "steps": 4, **fields}))
            while True:
                message = socket.recv()
                header = json.loads(message.partition(b"\n")[0] if isinstance(message, bytes) else message)
                assert header["frame"] == number
                if header["type"] != "started":
                    return header["type"]

        same = {"similar": 0.98}
        assert [kind(n, 200) for n in range(3)] == ["picture"] * 3  # off by default
        assert [kind(n, 200, **same) for n in range(12)] == ["picture", *["skipped"] * 10, "picture"]
        assert kind(12, 200, **same) == "skipped"
        assert kind(13, 200, **same, prompt="a blue square") == "picture"  # other words, the same drawing
        assert kind(14, 200, **same, prompt="a blue square", edit={"strength": 0.9}) == "picture"
        assert kind(15, 0, **same, prompt="a blue square", edit={"strength": 0.9}) == "picture"  # nothing alike
        assert kind(16, 200, **same) == "picture"
        assert kind(17, 200) == "picture"
        assert kind(18, 200, **same) == "picture"  # what stands is the one before
        assert kind(19, 200, **same, steps=3) == "failed"
        assert kind(20, 200, **same) == "picture"  # and what failed left nothing
        assert kind(21, 200, similar=0.98, edit=None, control={"scale": 1.0}) == "picture"
        assert kind(22, 200, similar=0.98, edit=None, control={"scale": 1.0}) == "skipped"
        text = live.http.get("/metrics").text
        assert 'outcome="skipped"} 12.0' in text and 'outcome="made"} 13.0' in text


def test_previews_come_as_partial_pictures_before_the_whole():
    with fake_server() as live, opened(live) as socket:
        socket.send_binary(frame(0, steps=4, previews=True, format="webp"))
        seen = []
        while not seen or seen[-1][0]["type"] != "picture":
            message = socket.recv()
            if isinstance(message, bytes):
                header, _, file = message.partition(b"\n")
                seen.append((json.loads(header), file))
    *partial, whole = seen
    assert whole[0]["frame"] == 0 and len(partial) >= 3
    assert [header["type"] for header, _ in partial] == ["partial"] * len(partial)
    steps = [header["step"] for header, _ in partial]
    assert steps == sorted(set(steps)) and {header["steps"] for header, _ in partial} == {4}
    for header, file in partial:
        image = Image.open(io.BytesIO(file))
        assert image.size == (header["width"], header["height"]) and image.format == "WEBP" and header["frame"] == 0


def test_a_failing_engine_is_answered_and_the_session_goes_on():
    with fake_server(faults={("denoiser", 4): Fault("fail")}) as live, opened(live) as socket:
        socket.send_binary(frame(0, steps=1))
        header, _ = heard(socket, "failed")
        assert header["frame"] == 0 and header["error"]["code"] == "engine_failed"
        socket.send_binary(frame(1, steps=1))
        assert heard(socket, "picture")[0]["frame"] == 1


def test_a_key_is_needed_where_keys_are_set():
    with fake_server(Settings(api_keys=("secret",))) as live:
        for first in ('{"key": "wrong"}', frame(0).decode()):
            with opened(live, ready=False) as socket:
                socket.send(first)
                error = refusal(socket)
                assert error["code"] == "invalid_api_key" and "first message" in error["message"]
                assert socket.recv_data()[1][:2] == (1008).to_bytes(2)
        with opened(live, ready=False) as socket:
            socket.send('{"key": "secret"}')
            assert json.loads(socket.recv())["type"] == "ready"
            socket.send_binary(frame(0, steps=1))
            assert heard(socket, "picture")[0]["frame"] == 0
        with opened(live, header=["Authorization: Bearer secret"]) as socket:
            socket.send_binary(frame(0, steps=1))
            assert heard(socket, "picture")[0]["frame"] == 0


def test_pages_of_other_servers_may_not_open_a_session():
    with fake_server(Settings(origins=("https://friend.example",))) as live:
        upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
        for stranger in ("http://stranger.example", "null", "http://127.0.0.1:1"):
            headers = {**upgrade, "Sec-WebSocket-Key": "A" * 22 + "==", "Origin": stranger}
            reply = httpx.get(live.url + "/v1/live", headers=headers, trust_env=False)
            assert reply.status_code == 403 and "FEWSTEP_ORIGINS" in reply.json()["error"]["message"]
        for known in (live.url, "https://friend.example"):
            with opened(live, origin=known) as socket:
                assert socket.connected


def test_sessions_are_bounded():
    with fake_server(Settings(max_live=1)) as live:
        with opened(live), opened(live, ready=False) as second:
            assert "1 live sessions are open" in refusal(second)["message"]
            assert second.recv_data()[1][:2] == (1013).to_bytes(2)
        until(lambda: "fewstep_live_sessions 0.0" in live.http.get("/metrics").text)
        with opened(live) as third:
            assert third.connected
