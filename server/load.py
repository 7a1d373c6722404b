"""`fewstep bench load`: open-loop traffic against a running server on this machine.

Arrivals are a Poisson process fixed before the first request is sent, and latency counts from the planned arrival, so a
slow server cannot slow its own test down. Every request asks for one picture and draws its step count from `--steps`.
"""

import argparse
import asyncio
import ipaddress
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fewstep.runtime.errors import InvalidRequest

if TYPE_CHECKING:
    import httpx

MAX_RATE_PER_S, MAX_SECONDS, MAX_REQUESTS = 1000.0, 600.0, 20_000
PROMPTS = (
    "a large red circle",
    "two green triangles",
    "a blue square above a yellow star",
    "a purple ring on a pink background",
)
_EXAMPLE = "example:\n  fewstep bench load --rate 2,5 --seconds 20 --steps 1,2,4 --json load.json"


@dataclass(frozen=True)
class Arrival:
    """One planned request: when it comes, in seconds from the start, and its step count."""

    at_s: float
    steps: int


@dataclass(frozen=True)
class Outcome:
    """What came of one request. kind: "ok", "rejected" (429 or 503) or "failed"; latency from its planned arrival."""

    steps: int
    kind: str
    latency_s: float


def plan_arrivals(rate_per_s: float, seconds: float, steps: Sequence[int], seed: int) -> list[Arrival]:
    """A Poisson process of `rate_per_s` over `seconds`, step counts drawn evenly. The same seed gives the same plan."""
    draw = random.Random(seed)
    arrivals: list[Arrival] = []
    at_s = draw.expovariate(rate_per_s)
    while at_s < seconds and len(arrivals) < MAX_REQUESTS:
        arrivals.append(Arrival(at_s, draw.choice(steps)))
        at_s += draw.expovariate(rate_per_s)
    return arrivals


def summarise(
    outcomes: Sequence[Outcome], *, server: str, rate_per_s: float, seconds: float, deadline_s: float
) -> list[dict[str, Any]]:
    """One row per step count, and one for all together where there are several.

    goodput counts pictures within the deadline per second of traffic; percentiles are over the pictures that came.
    """
    counts: list[tuple[Any, list[Outcome]]] = [
        (steps, [o for o in outcomes if o.steps == steps]) for steps in sorted({o.steps for o in outcomes})
    ]
    if len(counts) != 1:
        counts.append(("all", list(outcomes)))
    return [_row(steps, some, server, rate_per_s, seconds, deadline_s) for steps, some in counts]


def _row(
    steps: Any, some: Sequence[Outcome], server: str, rate_per_s: float, seconds: float, deadline_s: float
) -> dict[str, Any]:
    times = sorted(o.latency_s for o in some if o.kind == "ok")
    good = sum(t <= deadline_s for t in times)
    return {
        "server": server,
        "rate_per_s": rate_per_s,
        "steps": steps,
        "sent": len(some),
        "ok": len(times),
        "rejected": sum(o.kind == "rejected" for o in some),
        "failed": sum(o.kind == "failed" for o in some),
        **{f"p{p}_ms": _percentile_ms(times, p) for p in (50, 95, 99)},
        "goodput_per_s": good / seconds,
        "deadline_missed": len(times) - good,
    }


def _percentile_ms(times: Sequence[float], p: int) -> float | None:
    """Nearest rank; None without any time."""
    return 1e3 * times[max(0, -(-p * len(times) // 100) - 1)] if times else None


async def send_traffic(
    url: str, arrivals: Sequence[Arrival], *, model: str | None, timeout_s: float, key: str | None
) -> list[Outcome]:
    """Send each request at its time, whatever became of the ones before, and wait for all of them."""
    import httpx

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    async with httpx.AsyncClient(
        base_url=url, headers=headers, timeout=timeout_s, limits=limits, trust_env=False, follow_redirects=False
    ) as client:
        began_s = time.perf_counter()
        tasks = []
        for number, arrival in enumerate(arrivals):
            await asyncio.sleep(max(0.0, began_s + arrival.at_s - time.perf_counter()))
            body = {"prompt": PROMPTS[number % len(PROMPTS)], "num_inference_steps": arrival.steps, "seed": number}
            if model is not None:
                body["model"] = model
            tasks.append(asyncio.create_task(_send(client, body, arrival, began_s)))
        return list(await asyncio.gather(*tasks))


async def _send(client: "httpx.AsyncClient", body: dict[str, Any], arrival: Arrival, began_s: float) -> Outcome:
    import httpx

    try:
        reply = await client.post("/v1/images/generations", json=body)
        kind = "ok" if reply.status_code == 200 else "rejected" if reply.status_code in (429, 503) else "failed"
    except httpx.HTTPError:
        kind = "failed"
    return Outcome(arrival.steps, kind, time.perf_counter() - began_s - arrival.at_s)


def check_loopback(url: str) -> str:
    """The URL, if it points at this machine: a load test is not something to send to others.

    Errors: `InvalidRequest` where it does not.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if parts.scheme != "http" or not local:
        raise InvalidRequest("url", f"--url is {url!r}; load goes only to this machine, as in http://127.0.0.1:8000")
    return url.rstrip("/")


def command(argv: list[str]) -> int:
    """Exit codes: 0 every request was answered with a picture or a refusal, 1 some failed, 2 wrong use."""
    parser = argparse.ArgumentParser(
        prog="fewstep bench load",
        description="Open-loop Poisson traffic against a running server: percentiles and goodput.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="a server on this machine (%(default)s)")
    parser.add_argument("--rate", default="2", help="requests per second; several, with commas, run one after another")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help=f"length of each run (%(default)s, at most {MAX_SECONDS:g})"
    )
    parser.add_argument("--steps", default="4", help="step counts to draw from, with commas (%(default)s)")
    parser.add_argument("--model", help="model name (the server's default)")
    parser.add_argument(
        "--deadline", type=float, default=2.0, help="seconds within which a picture counts as good (%(default)s)"
    )
    parser.add_argument(
        "--timeout", type=float, default=60.0, help="seconds after which a request has failed (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the arrival times (%(default)s)")
    parser.add_argument("--api-key", help="sent as Bearer")
    parser.add_argument("--server", default="fewstep", help="name written in the rows (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="F", help="write the rows to this file")
    args = parser.parse_args(argv)
    url = check_loopback(args.url)
    rates, counts = _numbers("rate", args.rate, float, MAX_RATE_PER_S), _numbers("steps", args.steps, int, 1000)
    if not 0 < args.seconds <= MAX_SECONDS or max(rates) * args.seconds > MAX_REQUESTS:
        message = (
            f"--seconds is {args.seconds:g}; use at most {MAX_SECONDS:g}, and at most {MAX_REQUESTS} requests in all"
        )
        raise InvalidRequest("seconds", message)
    rows: list[dict[str, Any]] = []
    for rate in rates:
        arrivals = plan_arrivals(rate, args.seconds, counts, args.seed)
        print(f"{len(arrivals)} requests at {rate:g} per second ...", file=sys.stderr, flush=True)
        outcomes = asyncio.run(send_traffic(url, arrivals, model=args.model, timeout_s=args.timeout, key=args.api_key))
        rows += summarise(outcomes, server=args.server, rate_per_s=rate, seconds=args.seconds, deadline_s=args.deadline)
    print(_table(rows))
    if args.json:
        args.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    return 1 if any(row["failed"] for row in rows) else 0


def _numbers(name: str, text: str, kind: type, most: float) -> list[Any]:
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < value <= most for value in values):
        raise InvalidRequest(name, f"--{name} is {text!r}; use numbers above 0, at most {most:g}, with commas between")
    return values


def _table(rows: Sequence[dict[str, Any]]) -> str:
    names = list(rows[0]) if rows else []
    cells = [names, *([_cell(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)
