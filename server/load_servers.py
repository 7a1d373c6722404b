"""The servers that load is compared on, each a process of its own on this machine.

`python -m fewstep.server.load_servers POLICY BUNDLE ...` serves like `fewstep serve`, with the scheduling policy named.
A server writes one JSON line when it is ready (its URL, models, engines and measured costs), and ends when its standard
input closes, so that none outlives the bench.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fewstep.runtime.errors import EngineUnavailable

from .commands import listen, run_async, warmed
from .load_traffic import Target

READY_S = 180.0


@dataclass(frozen=True)
class Server:
    """A running server. said: what it wrote when it was ready."""

    name: str
    target: Target
    said: dict[str, Any]


@contextmanager
def started(name: str, module: str, arguments: Sequence[str], *, threads: int, native: bool) -> Iterator[Server]:
    """Start a server, wait until it is ready, and end it.

    Errors: `EngineUnavailable` where it does not come up; the end of its log is in the message.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, "--threads", str(threads), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
        timer = threading.Timer(READY_S, process.kill)
        timer.start()
        try:
            assert process.stdout
            line = process.stdout.readline()
            timer.cancel()
            if not line:
                process.wait()
                log.seek(0)
                reason = (log.read().strip() or "it gave no reason").splitlines()[-1]
                raise EngineUnavailable(f"the {name} server did not start: {reason}")
            said = json.loads(line)
            yield Server(name, Target(said["url"], tuple(said["models"]), native), said)
        finally:
            timer.cancel()
            _end(process)


def _end(process: "subprocess.Popen[str]") -> None:
    """Close the server's standard input, by which it ends; kill it where it does not."""
    assert process.stdin and process.stdout
    process.stdin.close()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


def end_with_stdin(server: Any) -> None:
    """Tell a uvicorn server to stop once whoever started this process closes its standard input, or is gone."""

    def wait() -> None:
        sys.stdin.read()
        server.should_exit = server.force_exit = True

    threading.Thread(target=wait, daemon=True).start()


def main(argv: Sequence[str]) -> int:
    """See the module text. Exit codes: 0."""
    parser = argparse.ArgumentParser(prog="python -m fewstep.server.load_servers")
    parser.add_argument("policy", choices=("earliest-due", "first-come"))
    parser.add_argument("bundles", nargs="+")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    import uvicorn

    from fewstep.runtime.sampling.request import Limits
    from fewstep.runtime.service.config import RuntimeConfig
    from fewstep.runtime.service.local import Runtime

    from .app import create_app
    from .settings import Settings

    config = RuntimeConfig(threads=args.threads, policy=args.policy, calibration_budget_s=4.0)
    limits = Limits(max_queue=100_000)  # nobody is refused for the length of the queue: only deadlines refuse
    with (
        listen("127.0.0.1", 0) as listener,
        Runtime(args.bundles, engine=args.engine, config=config, limits=limits) as runtime,
    ):
        app = create_app(runtime, Settings(max_queue=limits.max_queue))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        end_with_stdin(server)
        run_async(_serve(server, app, runtime, listener))
    return 0


async def _serve(server: Any, app: Any, runtime: Any, listener: Any) -> None:
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await warmed(app.state.service, serving)
    models = runtime.models.values()
    said = {
        "url": f"http://127.0.0.1:{listener.getsockname()[1]}",
        "models": [model.name for model in models],
        "engines": {model.name: model.engine_name for model in models},
        "costs": [[model, role, known] for (model, role), known in runtime.costs().items()],
    }
    print(json.dumps(said), flush=True)
    await serving


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
