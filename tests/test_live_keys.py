"""Keys of live sessions: one that is revoked ends its session, and who has shown none takes no seat."""

import json
import threading
from contextlib import closing, contextmanager

import pytest
from live import Live, fake_server, until
from websocket import WebSocket, create_connection

from fewstep.runtime.engines.fake_engine import Call
from fewstep.server import keys as key_module
from fewstep.server.keys import make_key, write_keys
from fewstep.server.settings import Settings


@pytest.fixture
def keyed(tmp_path, monkeypatch):
    """(settings, the key file, one key in it); a change of the file is seen at once."""
    monkeypatch.setattr(key_module, "_LOOK_S", 0.0)
    text, key = make_key("guest")
    file = tmp_path / "keys.json"
    write_keys(file, [key])
    return Settings(key_file=str(file), max_live=1), file, text


@contextmanager
def opened(live: Live, **options):
    with closing(create_connection(live.url.replace("http", "ws") + "/v1/live", timeout=20, **options)) as socket:
        yield socket
        socket.shutdown()


def enter(socket: WebSocket, text: str) -> None:
    socket.send(json.dumps({"key": text}))
    assert heard(socket)["type"] == "ready"


def draw(socket: WebSocket, number: int, **fields) -> None:
    socket.send(json.dumps({"frame": number, "prompt": "a", "seed": 0, "steps": 1, **fields}))


def heard(socket: WebSocket) -> dict:
    """The next message's header, but for those that say that a frame has begun."""
    while True:
        message = socket.recv()
        header = json.loads(message.partition(b"\n")[0] if isinstance(message, bytes) else message)
        if header["type"] != "started":
            return header


@pytest.mark.parametrize("by_header", [True, False])
def test_a_revoked_key_ends_its_session(keyed, by_header):
    settings, file, text = keyed
    with fake_server(settings) as live:
        options = {"header": [f"Authorization: Bearer {text}"]} if by_header else {}
        with opened(live, **options) as socket:
            if by_header:
                assert heard(socket)["type"] == "ready"
            else:
                enter(socket, text)
            draw(socket, 0)
            assert heard(socket)["type"] == "picture"
            write_keys(file, [])
            accepted = live.runtime.metrics().accepted
            draw(socket, 1)
            said = heard(socket)
            assert said["type"] == "failed" and said["error"]["code"] == "invalid_api_key"
            assert socket.recv_data()[1][:2] == (1008).to_bytes(2)
        assert live.runtime.metrics().accepted == accepted
        until(lambda: "fewstep_live_sessions 0.0" in live.http.get("/metrics").text)


def test_a_frame_that_waited_while_its_key_was_revoked_is_not_made(keyed):
    settings, file, text = keyed
    gate = threading.Event()

    def hold(call: Call) -> None:
        if call.role == "denoiser" and call.number >= 4:  # the first four warm the engine
            gate.wait(20)

    with fake_server(settings, before=hold) as live, opened(live) as socket:
        try:
            enter(socket, text)
            draw(socket, 0)
            assert json.loads(socket.recv())["type"] == "started"
            draw(socket, 1)
            draw(socket, 2)
            until(lambda: 'outcome="dropped"} 1.0' in live.http.get("/metrics").text)  # so the last one waits
            write_keys(file, [])
        finally:
            gate.set()
        said = [heard(socket), heard(socket)]
        assert [message["type"] for message in said] == ["picture", "failed"]
        assert (said[1]["frame"], said[1]["error"]["code"]) == (2, "invalid_api_key")


def test_a_key_whose_limits_changed_is_held_to_the_new_ones(keyed):
    settings, file, _ = keyed
    text, key = make_key("artist")
    write_keys(file, [key])
    with fake_server(settings) as live, opened(live) as socket:
        enter(socket, text)
        draw(socket, 0)
        assert heard(socket)["type"] == "picture"
        slow = {**vars(key), "rate_per_s": 0.01, "burst": 1}
        write_keys(file, [type(key)(**slow)])
        said = []
        for number in (1, 2):
            draw(socket, number)
            said.append(heard(socket))
        assert said[0]["type"] == "picture" and said[1]["error"]["code"] == "key_rate"


def test_who_has_shown_no_key_takes_no_seat(keyed):
    settings, _, text = keyed
    with fake_server(settings) as live, opened(live), opened(live) as second, opened(live) as third:
        enter(second, text)
        assert "fewstep_live_sessions 1.0" in live.http.get("/metrics").text
        third.send(json.dumps({"key": text}))
        assert heard(third)["error"]["code"] == "overloaded"
        assert third.recv_data()[1][:2] == (1013).to_bytes(2)
