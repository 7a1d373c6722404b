"""The gate before sockets: keys and origins at the handshake, and every frame a request of its key."""

import pytest
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from fewstep.runtime.engines.fake_engine import FakeEngine, fake_bundle
from fewstep.runtime.service.local import Runtime
from fewstep.server.app import create_app
from fewstep.server.keys import make_key, write_keys
from fewstep.server.settings import Settings


@pytest.fixture
def sockets(tmp_path):
    """(a client of a server with a key file, the headers of two keys in it)."""
    made = {"free": make_key("free"), "slow": make_key("slow", rate_per_s=0.01, burst=2)}
    file = tmp_path / "keys.json"
    write_keys(file, [key for _, key in made.values()])
    keys = {name: {"Authorization": f"Bearer {text}"} for name, (text, _) in made.items()}
    with (
        Runtime([fake_bundle()], engines={"fake": FakeEngine()}) as runtime,
        TestClient(create_app(runtime, Settings(key_file=str(file)))) as client,
    ):
        yield client, keys


def test_a_socket_of_another_site_or_with_a_wrong_key_is_refused_at_the_handshake(sockets):
    client, keys = sockets
    for headers in ({"Origin": "https://evil.example"}, {"Authorization": "Bearer wrong"}):
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/live", headers=headers):
            pytest.fail("it was let in")
    with client.websocket_connect("/v1/live", headers=keys["free"]) as socket:
        assert socket.receive_json()["type"] == "ready"


def test_frames_of_a_socket_are_requests_of_its_key(sockets):
    client, keys = sockets
    answers = []
    with client.websocket_connect("/v1/live", headers=keys["slow"]) as socket:
        assert socket.receive_json()["type"] == "ready"
        for frame in range(3):
            socket.send_json({"frame": frame, "prompt": "a", "seed": 0, "steps": 1})
            while (message := socket.receive())["type"] == "websocket.send" and "bytes" not in message:
                if '"failed"' in message["text"]:
                    break
            answers.append(message.get("text", "picture"))
    assert answers[:2] == ["picture", "picture"] and "key_rate" in answers[2]
