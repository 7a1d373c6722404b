"""Shutting down with live sessions open: the frame that is drawn arrives, then the socket closes, then the server."""

import asyncio
import contextlib
import gc
import json
import logging
import signal
import subprocess
import sys

import httpx
import pytest
import websocket

from fewstep.runtime.engines.fake_engine import FakeEngine, fake_bundle
from fewstep.runtime.service.local import Runtime
from fewstep.server.app import create_app
from fewstep.server.commands import run_async, warmed

SERVE = """
import sys
from fewstep.runtime.engines.fake_engine import FakeEngine, fake_bundle
from fewstep.runtime.service.local import Runtime
from fewstep.server.app import create_app
from fewstep.server.commands import listen, run, run_async
from fewstep.server.settings import Settings

settings = Settings(drain_delay_s=0.1, drain_s=10.0)
with listen("127.0.0.1", 0) as listener, Runtime([fake_bundle()], engines={"fake": FakeEngine(delay_s=0.1)}) as runtime:
    sys.exit(run_async(run(create_app(runtime, settings), settings, listener)))
"""


def test_a_session_gets_its_last_picture_and_is_told_to_come_back():
    with subprocess.Popen([sys.executable, "-c", SERVE], stdout=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().split()[4]
            assert process.stdout.readline().startswith("ready")
            address = url.replace("http", "ws") + "/v1/live"
            with contextlib.closing(websocket.create_connection(address, timeout=20)) as socket:
                assert json.loads(socket.recv())["type"] == "ready"
                socket.send(json.dumps({"frame": 1, "prompt": "a", "seed": 0, "steps": 8}))
                assert json.loads(socket.recv())["type"] == "started"
                process.send_signal(signal.SIGTERM)
                picture = socket.recv()
                assert json.loads(picture.split(b"\n")[0])["type"] == "picture"
                code, frame = socket.recv_data_frame(control_frame=True)
                assert code == websocket.ABNF.OPCODE_CLOSE and int.from_bytes(frame.data[:2]) == 1012
                socket.shutdown()  # `close` leaves a socket open that the server has closed
            assert process.wait(20) == 0
            with pytest.raises(httpx.ConnectError):
                httpx.get(url + "/health", trust_env=False)
        finally:
            process.kill()


def test_what_is_there_once_it_is_warm_is_kept_from_the_garbage_collector():
    """A full collection through torch's objects took 0.3 s, and every request that waited was late."""
    with Runtime([fake_bundle()], engines={"fake": FakeEngine()}) as runtime:
        service = create_app(runtime).state.service

        async def wait():
            serving = asyncio.create_task(asyncio.sleep(60))
            waiting = asyncio.create_task(warmed(service, serving))
            await asyncio.sleep(0.05)
            assert not waiting.done() and gc.get_freeze_count() == 0
            await service.health.warm()
            await waiting
            serving.cancel()

        try:
            asyncio.run(wait())
            assert gc.get_freeze_count() > 100_000
        finally:
            gc.unfreeze()


def test_the_event_is_there_before_any_loop_runs():
    """`create_app` is called outside of a loop, and what it makes is used within one."""
    with Runtime([fake_bundle()], engines={"fake": FakeEngine()}) as runtime:
        health = create_app(runtime).state.service.health
        assert not health.leaving.is_set()


def test_the_loop_is_uvicorns_choice_and_the_logs_stay_ours():
    before = {name: list(logging.getLogger(name).handlers) for name in ("uvicorn", "uvicorn.access")}

    async def kind() -> str:
        return type(asyncio.get_running_loop()).__module__

    assert run_async(kind()) == "uvloop"
    assert {name: list(logging.getLogger(name).handlers) for name in before} == before
