"""A real server on a loopback port, for tests that talk HTTP to it."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn

from fewstep.runtime.engines.fake_engine import FakeEngine, fake_bundle, fake_spec
from fewstep.runtime.sampling.request import Limits
from fewstep.runtime.service.local import Runtime
from fewstep.server.app import create_app
from fewstep.server.commands import listen
from fewstep.server.settings import Settings


@dataclass(frozen=True)
class Live:
    """A running server: its address, a client for it, and what is behind it."""

    url: str
    http: httpx.Client
    app: Any
    runtime: Runtime
    engine: FakeEngine | None

    def images(self, **body: Any) -> httpx.Response:
        return self.http.post("/v1/images/generations", json={"prompt": "a red circle", **body})

    def generate(self, **body: Any) -> httpx.Response:
        return self.http.post("/v1/generate", json={"prompt": "a red circle", **body})


@contextlib.contextmanager
def serving(
    runtime: Runtime, settings: Settings | None = None, engine: FakeEngine | None = None, *, wait: bool = True
) -> Iterator[Live]:
    """Serve a runtime with uvicorn in a thread, ready unless `wait` is false; stopped and joined at the end."""
    app = create_app(runtime, settings or Settings())
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=5))
    with listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            with httpx.Client(base_url=url, trust_env=False, timeout=20) as http:
                until(lambda: server.started)
                if wait:
                    until(lambda: http.get("/ready").status_code == 200)
                yield Live(url, http, app, runtime, engine)
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive()


@contextlib.contextmanager
def fake_server(
    settings: Settings | None = None,
    *,
    limits: Limits | None = None,
    wait: bool = True,
    spec: Any = None,
    **engine: Any,
) -> Iterator[Live]:
    """A server over one model, `fake`, whose engine takes `engine`'s settings (delay_s, faults, before ...)."""
    spec = spec or fake_spec()
    fake = FakeEngine(spec, **engine)
    with (
        Runtime([fake_bundle("fake", spec)], engines={"fake": fake}, limits=limits or Limits()) as runtime,
        serving(runtime, settings, fake, wait=wait) as live,
    ):
        yield live


def until(holds: Callable[[], bool], timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)
