"""Models loaded and unloaded over HTTP: by admin keys only, by name only, while others are served."""

import shutil
import threading

import pytest
from live import serving, until

from fewstep.runtime.engines.fake_engine import FakeEngine, fake_bundle
from fewstep.runtime.service.local import Runtime
from fewstep.server.keys import make_key, write_keys
from fewstep.server.settings import Settings


@pytest.fixture
def keyed(tmp_path):
    """(settings with a key file and a folder of models, headers of an admin and of a user)."""
    made = {"admin": make_key("admin", admin=True), "user": make_key("user")}
    file = tmp_path / "keys.json"
    write_keys(file, [key for _, key in made.values()])
    (tmp_path / "models").mkdir()
    headers = {name: {"Authorization": f"Bearer {text}"} for name, (text, _) in made.items()}
    return Settings(key_file=str(file), models_dir=str(tmp_path / "models"), drain_s=0.3), headers


def test_a_bundle_is_loaded_served_and_unloaded(keyed, tiny_lcm, tmp_path):
    settings, keys = keyed
    admin = keys["admin"]
    shutil.copytree(tiny_lcm.root, tmp_path / "models" / "tiny-lcm")
    with (
        Runtime([fake_bundle()], engines={"fake": FakeEngine()}, engine="torch") as runtime,
        serving(runtime, settings) as live,
    ):
        asked = {"prompt": "a", "steps": 1, "model": "tiny-lcm"}
        assert live.http.post("/v1/generate", json=asked, headers=admin).status_code == 404
        reply = live.http.post("/v1/models/tiny-lcm", headers=admin)
        assert reply.status_code == 200 and reply.json()["id"] == "tiny-lcm"
        assert live.http.post("/v1/models/tiny-lcm", headers=admin).status_code == 400, "it is there already"
        listed = live.http.get("/v1/models", headers=admin).json()["data"]
        assert [card["id"] for card in listed] == ["fake", "tiny-lcm"]
        assert live.http.post("/v1/generate", json=asked, headers=keys["user"]).status_code == 200
        assert 'fewstep_model_in_memory{model="tiny-lcm"} 1.0' in live.http.get("/metrics").text
        reply = live.http.delete("/v1/models/tiny-lcm", headers=admin)
        assert reply.json() == {"id": "tiny-lcm", "object": "model", "deleted": True}
        assert live.http.post("/v1/generate", json=asked, headers=admin).status_code == 404
        assert live.http.delete("/v1/models/tiny-lcm", headers=admin).status_code == 404


@pytest.mark.parametrize("name", ["nothing-here", "..", "%2e%2e%2fkeys.json", ".hidden", "a%2fb", "x" * 200])
def test_what_is_no_model_of_this_server_is_not_opened(keyed, name):
    settings, keys = keyed
    with Runtime([fake_bundle()], engines={"fake": FakeEngine()}) as runtime, serving(runtime, settings) as live:
        reply = live.http.post(f"/v1/models/{name}", headers=keys["admin"])
        assert reply.status_code in (400, 404, 405) and "error" in reply.json()
        assert list(runtime.models) == ["fake"]


def test_only_admins_may_and_nobody_where_there_are_no_keys(keyed):
    settings, keys = keyed
    with Runtime([fake_bundle()], engines={"fake": FakeEngine()}) as runtime:
        with serving(runtime, settings) as live:
            for method in ("POST", "DELETE"):
                assert live.http.request(method, "/v1/models/fake").status_code == 401
                reply = live.http.request(method, "/v1/models/fake", headers=keys["user"])
                assert (reply.status_code, reply.json()["error"]["code"]) == (403, "admin_key_required")
            reply = live.http.delete("/v1/models/fake", headers=keys["admin"])
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "name"), "the last one stays"
        with serving(runtime) as live:
            assert live.http.delete("/v1/models/fake").status_code == 403
        assert list(runtime.models) == ["fake"]


def test_unloading_waits_for_what_runs_and_then_ends_it(keyed):
    settings, keys = keyed
    engines = {"fake": FakeEngine(), "slow": FakeEngine(delay_s=0.1)}
    with Runtime([fake_bundle(), fake_bundle("slow")], engines=engines) as runtime, serving(runtime, settings) as live:
        replies = []

        def ask(steps):
            body = {"prompt": "a", "steps": steps, "n": steps, "model": "slow"}
            replies.append(live.http.post("/v1/generate", json=body, headers=keys["user"]))

        thread = threading.Thread(target=ask, args=[8])
        thread.start()
        until(lambda: runtime.metrics().live == 1)
        assert live.http.delete("/v1/models/slow", headers=keys["admin"]).status_code == 200
        thread.join()
        (reply,) = replies
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "shutting_down")
        assert list(runtime.models) == ["fake"]
        assert live.http.post("/v1/generate", json={"prompt": "a", "steps": 1}, headers=keys["user"]).status_code == 200
