"""`fewstep serve`: bundles over HTTP until told to stop, then a graceful end."""

import argparse
import asyncio
import gc
import importlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from .service import Service
    from .settings import Settings

T = TypeVar("T")
SWITCH_S = 0.00002
"""For how long one thread may keep the interpreter from another. Every operation of torch gives it away and needs it
back, so the engine's thread waits this long a dozen times per call while the event loop has something to do. At 1.5 of
capacity a row took 4.2 ms with 0.5 ms, 3.8 with 0.1 and 3.4 with this; less than this gained nothing."""

_EXAMPLE = """example:
  fewstep serve scenes-lcm scenes-teacher --port 8000
  curl -s localhost:8000/v1/images/generations -H 'Content-Type: application/json' \\
       -d '{"prompt": "a red circle", "num_inference_steps": 4}'

Every setting is also an environment variable, FEWSTEP_PORT for --port; docs/server.md lists them all."""


def serve(argv: list[str]) -> int:
    """Exit codes: 0 stopped as asked, 1 a model failed to warm up, 2 wrong use."""
    args = _parser().parse_args(argv)
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        print(f"fewstep serve: {error.name} is not installed; run: pip install 'fewstep[serve]'", file=sys.stderr)
        return 2
    from fewstep.runtime.sampling.request import Limits
    from fewstep.runtime.service.config import RuntimeConfig
    from fewstep.runtime.service.local import Runtime

    from .app import create_app
    from .logs import configure
    from .settings import Settings

    given = {k: v for k, v in vars(args).items() if k != "bundles" and v is not None}
    flags: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    settings = replace(Settings.from_environment(os.environ), **flags)
    configure(settings.log)
    scorer = named_function(settings.scorer) if settings.scorer else None
    with listen(settings.host, settings.port) as listener:
        runtime = Runtime(
            args.bundles,
            engine=settings.engine,
            allow_unproven=settings.allow_unproven,
            limits=Limits(max_n=settings.max_n, max_queue=settings.max_queue),
            config=RuntimeConfig(memory_budget_bytes=settings.memory_bytes or None),
            groups=settings.groups,
            scorer=scorer,
        )
        with runtime:
            return run_async(run(create_app(runtime, settings), settings, listener))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fewstep serve",
        description="Serve bundles over HTTP: OpenAI's images API, a native API, metrics and a page.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "bundles", nargs="+", metavar="DIR", help="bundle folder or short name; the first is the default model"
    )
    parser.add_argument("--host", help="address to listen at (127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, help="port to listen at (8000; 0 picks a free one)")
    parser.add_argument("--engine", metavar="KIND", help="engine of every model: auto, torch, onnx, openvino-bf16, ...")
    parser.add_argument(
        "--allow-unproven",
        action="store_true",
        default=None,
        help="serve an engine built for a GPU that none has run yet",
    )
    parser.add_argument(
        "--group", dest="groups", action="append", metavar="F", help="a JSON file of models served as one; repeatable"
    )
    parser.add_argument(
        "--scorer", metavar="MODULE:FUNCTION", help="says how good a picture is, for requests whose helper refines"
    )
    parser.add_argument("--key-file", metavar="F", help="API keys, as `fewstep keys` makes them")
    parser.add_argument("--log", choices=("quiet", "text", "json"), help="a line per call, or faults only (quiet)")
    parser.add_argument("--max-queue", type=int, help="requests held before new ones get 429 (256)")
    return parser


def named_function(name: str) -> Callable[..., Any]:
    """A function of the operator's, as "module:function"; the working folder's modules are found, too.

    Errors: `BadSetting` where there is none.
    """
    from .settings import BadSetting

    module, _, function = name.partition(":")
    if not (module and function):
        raise BadSetting(f"scorer is {name!r}; write module:function")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise BadSetting(f"scorer is {name!r}, and {module!r} cannot be imported: {error}") from error
    if not callable(found):
        raise BadSetting(f"scorer is {name!r}, but {module!r} has no function {function!r}")
    return cast(Callable[..., Any], found)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, taken before the models load, so that a busy port is said at once.

    The protocol is named because asyncio turns Nagle's algorithm off only where it is; left on, each reply waits 40 ms.

    Errors: `BadSetting` where the address cannot be had.
    """
    from .settings import BadSetting

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        reason = error.strerror or error
        raise BadSetting(f"cannot listen at {host}:{port}: {reason}; choose another --host or --port") from error
    return listener


def run_async(served: Coroutine[Any, Any, T]) -> T:
    """Run a server to its end on the event loop that uvicorn prefers: uvloop, or asyncio's where there is none."""
    import uvicorn

    sys.setswitchinterval(SWITCH_S)
    chosen = uvicorn.Config("", loop="auto", log_config=None)  # else it would set up its own log here
    with asyncio.Runner(loop_factory=chosen.get_loop_factory()) as runner:
        return runner.run(served)


async def warmed(service: "Service", serving: "asyncio.Task[None]") -> None:
    """Wait until the models have made their first pictures, and keep the garbage collector from what is there then.

    A full collection goes through every object of torch and its kin: 0.3 s in which nobody is answered.
    """
    while service.health.state == "warming" and not serving.done():
        await asyncio.sleep(0.01)
    gc.collect()
    gc.freeze()


async def run(app: Any, settings: "Settings", listener: socket.socket) -> int:
    """Serve an app from the main thread until SIGTERM or SIGINT, then drain. Exit codes as `serve`."""
    import uvicorn

    service = app.state.service
    grace_s = max(1, round(settings.drain_s))
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=grace_s,
        ws_max_size=settings.max_body_bytes,
        ws_per_message_deflate=False,  # what is large is a picture, compressed already
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    loop = asyncio.get_running_loop()

    leaving: list[asyncio.Task[None]] = []

    async def leave(delay_s: float) -> None:
        """Serve on for a while, let live sessions end what they draw, then close the port and wait for what runs."""
        await asyncio.sleep(delay_s)
        service.health.leaving.set()
        end_s = loop.time() + settings.drain_s
        while app.state.lobby.open and loop.time() < end_s:
            await asyncio.sleep(0.02)
        server.should_exit = True

    def stop(delay_s: float) -> None:
        """Say no at /ready and leave. Twice: end at once."""
        if service.health.state == "draining":
            server.force_exit = server.should_exit = True
        service.health.drain()
        leaving.append(asyncio.create_task(leave(delay_s)))

    loop.add_signal_handler(signal.SIGTERM, stop, settings.drain_delay_s)
    loop.add_signal_handler(signal.SIGINT, stop, 0.0)
    host, port = listener.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    print(f"fewstep serves {', '.join(service.runtime.models)} at http://{address}:{port} (warming up)", flush=True)
    await warmed(service, serving)
    failed = service.health.state == "failed"
    if failed:
        print(f"fewstep serve: {service.health.reason}", file=sys.stderr)
        server.should_exit = True
    elif service.health.state == "ready":
        engines = ", ".join(f"{m.name} on {m.engine_name}" for m in service.runtime.models.values())
        print(f"ready: {engines}. Ctrl-C stops.", flush=True)
    await serving
    return 1 if failed else 0
