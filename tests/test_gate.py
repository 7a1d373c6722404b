"""What stands before the routes: keys with limits, pages of other sites, request ids, and bodies that are no bodies."""

import base64
import gzip
import re
import threading

import pytest
from live import fake_server, until
from starlette.datastructures import Headers

from fewstep.server.gate import own_origin
from fewstep.server.keys import make_key, write_keys
from fewstep.server.settings import BadSetting, Settings


@pytest.fixture
def keyed(tmp_path):
    """(settings with a key file, the keys in it by name)."""
    made = {
        "free": make_key("free"),
        "slow": make_key("slow", rate_per_s=0.01, burst=2),
        "small": make_key("small", share=0.1),
    }
    file = tmp_path / "keys.json"
    write_keys(file, [key for _, key in made.values()])
    texts = {name: {"Authorization": f"Bearer {text}"} for name, (text, _) in made.items()}
    return Settings(key_file=str(file), max_queue=20), texts


def metrics(live) -> str:
    return live.http.get("/metrics").text


def test_whatever_is_not_named_open_needs_a_key(keyed):
    settings, keys = keyed
    with fake_server(settings) as live:
        for path in ("/", "/health", "/ready", "/metrics", "/openapi.json", "/page/page.js"):
            assert live.http.get(path).status_code == 200
        for path in ("/v1/models", "/v1/info", "/sdapi/v1/options", "/docs", "/nothing", "/page", "/metrics/x"):
            assert live.http.get(path).status_code == 401, path
        assert live.http.get("/v1/models", headers=keys["free"]).status_code == 200
        text = keys["free"]["Authorization"].split()[1]
        basic = base64.b64encode(f"user:{text}".encode()).decode()
        assert live.http.get("/v1/models", headers={"Authorization": f"Basic {basic}"}).status_code == 200


def test_a_key_above_its_rate_is_told_when_to_come_back(keyed):
    settings, keys = keyed
    with fake_server(settings) as live:
        body = {"prompt": "a", "steps": 1}
        replies = [live.http.post("/v1/generate", json=body, headers=keys["slow"]) for _ in range(3)]
        assert [reply.status_code for reply in replies] == [200, 200, 429]
        assert replies[2].json()["error"]["code"] == "key_rate"
        assert 90 <= int(replies[2].headers["retry-after"]) <= 101
        assert live.http.get("/v1/models", headers=keys["slow"]).status_code == 200, "reading is free"
        assert live.http.post("/v1/generate", json=body, headers=keys["free"]).status_code == 200
        page = metrics(live)
    assert 'fewstep_key_requests_total{decision="accepted",key="slow"} 2.0' in page
    assert 'fewstep_key_requests_total{decision="finished",key="slow"} 2.0' in page
    assert 'fewstep_key_requests_total{decision="key_rate",key="slow"} 1.0' in page


def test_a_key_holds_no_more_than_its_share_of_the_queue(keyed):
    settings, keys = keyed
    with fake_server(settings, delay_s=0.1) as live:
        began, statuses = len(live.engine.calls), []

        def one(name):
            reply = live.http.post("/v1/generate", json={"prompt": "a", "steps": 8}, headers=keys[name])
            statuses.append(reply.status_code)

        threads = [threading.Thread(target=one, args=["small"]) for _ in range(2)]
        for thread in threads:
            thread.start()
        until(lambda: live.runtime.metrics().live == 2 and len(live.engine.calls) > began)
        refused = live.http.post("/v1/generate", json={"prompt": "a"}, headers=keys["small"])
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "key_share")
        assert refused.headers["retry-after"] == "1"
        assert live.http.post("/v1/generate", json={"prompt": "a", "steps": 1}, headers=keys["free"]).status_code == 200
        for thread in threads:
            thread.join()
        one("small")
        assert statuses == [200, 200, 200]
        assert 'fewstep_key_requests_total{decision="key_share",key="small"} 1.0' in metrics(live)


def test_a_refused_request_gives_its_place_back(keyed):
    settings, keys = keyed
    with fake_server(settings) as live:
        for steps in (3, 3, 3, 1):
            reply = live.http.post("/v1/generate", json={"prompt": "a", "steps": steps}, headers=keys["small"])
            assert reply.status_code == (400 if steps == 3 else 200)
        assert live.app.state.service.callers.find(keys["small"]["Authorization"].split()[1]).held == 0


def test_a_request_id_comes_back_and_a_strange_one_is_replaced():
    with fake_server() as live:
        assert live.http.get("/health", headers={"x-request-id": "abc-1.2:3"}).headers["x-request-id"] == "abc-1.2:3"
        for given in ("a b", "x" * 129, "Ω".encode(), ""):
            made = live.http.get("/nothing", headers={"x-request-id": given}).headers["x-request-id"]
            assert re.fullmatch(r"req-[0-9a-f]{16}", made)


def test_pages_of_other_sites_may_not_act():
    with fake_server(Settings(origins=("https://studio.example",))) as live:
        body = {"prompt": "a", "steps": 1}
        for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
            reply = live.http.post("/v1/generate", json=body, headers={"Origin": origin})
            assert (reply.status_code, reply.json()["error"]["code"]) == (403, "foreign_origin")
            assert "access-control-allow-origin" not in reply.headers
        assert live.http.post("/v1/generate", json=body, headers={"Origin": live.url}).status_code == 200
        reply = live.http.post("/v1/generate", json=body, headers={"Origin": "https://studio.example"})
        assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == "https://studio.example"
        ask = {"Origin": "https://studio.example", "Access-Control-Request-Method": "POST"}
        assert live.http.request("OPTIONS", "/v1/generate", headers=ask).status_code == 200


@pytest.mark.parametrize(
    ("host", "bound", "own"),
    [
        ("127.0.0.1:8000", "127.0.0.1", True),
        ("localhost:8000", "127.0.0.1", True),
        ("studio.localhost:8000", "127.0.0.1", True),
        ("[::1]:8000", "127.0.0.1", True),
        ("192.168.1.7:8000", "0.0.0.0", True),
        ("MyBox.lan:8000", "mybox.lan", True),
        ("rebound.example:8000", "127.0.0.1", False),
        ("rebound.example:8000", "0.0.0.0", False),
        ("127.0.0.1.evil.example", "127.0.0.1", False),
        ("notlocalhost:8000", "127.0.0.1", False),
        ("rebound.example:8000", None, True),
        ("[", "127.0.0.1", False),
        ("", "127.0.0.1", False),
    ],
)
def test_without_keys_a_name_that_anybody_may_point_here_is_not_our_own(host, bound, own):
    """DNS rebinding: the browser sends its page's name as both `Origin` and `Host`."""
    assert own_origin(Headers({"host": host, "origin": f"http://{host}"}), (), bound) is own
    assert own_origin(Headers({"host": host}), (), bound), "no page calls"
    assert own_origin(Headers({"host": host, "origin": f"http://{host}"}), (f"http://{host}",), bound)


def test_a_page_under_a_name_needs_keys_or_to_be_listed(keyed):
    settings, keys = keyed
    body = {"prompt": "a", "steps": 1}
    page = {"Host": "rebound.example", "Origin": "http://rebound.example"}
    with fake_server() as live:
        reply = live.http.post("/v1/generate", json=body, headers=page)
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "foreign_origin")
        assert live.http.post("/v1/generate", json=body, headers={"Host": "service"}).status_code == 200
        broken = live.http.post("/v1/generate", json=body, headers={"Origin": "http://["})
        assert (broken.status_code, broken.json()["error"]["code"]) == (403, "foreign_origin")
    with fake_server(Settings(origins=("http://rebound.example",))) as live:
        assert live.http.post("/v1/generate", json=body, headers=page).status_code == 200
    with fake_server(settings) as live:
        assert live.http.post("/v1/generate", json=body, headers={**page, **keys["free"]}).status_code == 200


def test_without_origins_no_browser_is_invited():
    with fake_server() as live:
        ask = {"Origin": "https://studio.example", "Access-Control-Request-Method": "POST"}
        assert live.http.request("OPTIONS", "/v1/generate", headers=ask).status_code == 405
        reply = live.http.get("/v1/models", headers={"Origin": "https://studio.example"})
        assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize("origin", ["studio.example", "https://a/b", "*"])
def test_an_origin_that_is_none_is_refused(origin):
    with pytest.raises(BadSetting, match="FEWSTEP_ORIGINS"):
        Settings(origins=(origin,))


def test_a_compressed_body_is_not_unpacked():
    with fake_server(Settings(max_body_bytes=4096)) as live:
        bomb = gzip.compress(b'{"prompt": "' + b"a" * 2_000_000 + b'"}')
        headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
        reply = live.http.post("/v1/generate", content=bomb, headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (415, "unsupported_encoding")
