"""`fewstep bench load`: bundles side by side with other ways to serve them, or traffic to a server that runs.

With bundles it starts the servers itself (`load_compare`), each request drawn from stated workloads (`load_plan`).
Without, it sends a Poisson process to a server on this machine that speaks OpenAI's API.
"""

import argparse
import asyncio
import ipaddress
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fewstep.runtime.errors import InvalidRequest

from .load_plan import MAX_REQUESTS, Kind, plan_arrivals
from .load_report import charts, markdown, summarise
from .load_traffic import Target, send_traffic

MAX_RATE_PER_S, MAX_SECONDS = 1000.0, 600.0
MARKS = ("<!-- load: written by fewstep bench load -->\n", "<!-- load: end -->\n")
_EXAMPLE = """example:
  fewstep bench load scenes-lcm scenes-teacher --json load.json --page docs/serving.md
  fewstep bench load --url http://127.0.0.1:8000 --rate 2,5 --seconds 20 --steps 1,2,4"""


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
    """Exit codes: 0 done, 1 requests to the server at --url failed, 2 wrong use."""
    parser = argparse.ArgumentParser(
        prog="fewstep bench load",
        description="With bundles (a student, and its teacher): this server, first-come-first-served batching and "
        "plain diffusers, side by side. Without: open-loop Poisson traffic to the server at --url.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundles", nargs="*", metavar="DIR", help="a student bundle, and a teacher for the 25-step mix")
    parser.add_argument("--seconds", type=float, help="length of each run (10, or 5 side by side)")
    parser.add_argument("--seed", type=int, default=0, help="of the arrival times (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="F", help="write the rows to this file")
    beside = parser.add_argument_group("side by side")
    beside.add_argument("--engine", default="auto", metavar="KIND", help="of every server but diffusers (%(default)s)")
    beside.add_argument("--threads", type=int, default=1, help="CPU threads of each server's engine (%(default)s)")
    beside.add_argument("--page", type=Path, metavar="F.md", help="write claims, tables and charts into this page")
    beside.add_argument("--simulate", type=Path, metavar="F.json", help="on a simulated clock, with that file's costs")
    running = parser.add_argument_group("a server that runs")
    running.add_argument("--url", default="http://127.0.0.1:8000", help="a server on this machine (%(default)s)")
    running.add_argument("--rate", default="2", help="requests per second; several, with commas, run in turn")
    running.add_argument("--steps", default="4", help="step counts to draw from, with commas (%(default)s)")
    running.add_argument("--model", help="model name (the server's default)")
    running.add_argument("--deadline", type=float, default=2.0, help="seconds in which a picture counts (%(default)s)")
    running.add_argument("--timeout", type=float, default=60.0, help="seconds until a request failed (%(default)s)")
    running.add_argument("--api-key", help="sent as Bearer")
    running.add_argument("--server", default="fewstep", help="name written in the rows (%(default)s)")
    args = parser.parse_args(argv)
    if args.bundles or args.simulate:
        return _side_by_side(args, argv)
    return _one_server(args)


def _side_by_side(args: argparse.Namespace, argv: Sequence[str]) -> int:
    if len(args.bundles) > 2:
        raise InvalidRequest(
            "bundles", f"{len(args.bundles)} bundles are given; give a student, and perhaps its teacher"
        )
    seconds = 5.0 if args.seconds is None else args.seconds
    if not 1 <= seconds <= MAX_SECONDS:
        raise InvalidRequest("seconds", f"--seconds is {seconds:g}; use 1 to {MAX_SECONDS:g}")
    if args.simulate is not None:
        from .load_simulated import simulated

        report = simulated(json.loads(args.simulate.read_text()), seed=args.seed)
    else:
        from .load_compare import Plan, compare

        report = compare(Plan(tuple(args.bundles), args.engine, args.threads, seconds, args.seed))
    report = {"command": shlex.join(["fewstep", "bench", "load", *argv]), **report}
    print(markdown(report))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.page:
        write_page(args.page, report)
    return 0


def write_page(page: Path, report: Mapping[str, Any]) -> None:
    """Put a report between the page's marks, and its charts into the folder of the page's name.

    Errors: `InvalidRequest` where the page has no marks.
    """
    text = page.read_text() if page.exists() else "".join(MARKS)
    head, begun, rest = text.partition(MARKS[0])
    _, ended, tail = rest.partition(MARKS[1])
    if not begun or not ended:
        raise InvalidRequest("page", f"{page} has no place for the report; put {MARKS[0]!r} and {MARKS[1]!r} into it")
    folder = page.with_suffix("")
    folder.mkdir(exist_ok=True)
    images = []
    for name, svg in charts(report["rows"]).items():
        (folder / f"{name}.svg").write_text(svg)
        images.append(f"![{name}]({folder.name}/{name}.svg)")
    machine = report["machine"]
    facts = "; ".join(f"{key} {value}" for key, value in machine.items() if not isinstance(value, Mapping))
    engines = ", ".join(f"{name} on {engine}" for name, engine in report["engines"].items())
    origin = f"Made by `{report['command']}`: {engines}, {report['threads']} thread(s). {facts}."
    body = "\n\n".join([origin, markdown(report).strip(), *images])
    page.write_text(head + MARKS[0] + "\n" + body + "\n\n" + MARKS[1] + tail)


def _one_server(args: argparse.Namespace) -> int:
    url, seconds = check_loopback(args.url), 10.0 if args.seconds is None else args.seconds
    rates, counts = _numbers("rate", args.rate, float, MAX_RATE_PER_S), _numbers("steps", args.steps, int, 1000)
    if not 0 < seconds <= MAX_SECONDS or max(rates) * seconds > MAX_REQUESTS:
        message = f"--seconds is {seconds:g}; use at most {MAX_SECONDS:g}, and at most {MAX_REQUESTS} requests in all"
        raise InvalidRequest("seconds", message)
    target = Target(url, (args.model,), key=args.api_key, timeout_s=args.timeout)
    rows: list[dict[str, Any]] = []
    for rate in rates:
        arrivals = plan_arrivals(rate, seconds, [(Kind(steps), 1.0) for steps in counts], args.seed)
        print(f"{len(arrivals)} requests at {rate:g} per second ...", file=sys.stderr, flush=True)
        outcomes = asyncio.run(send_traffic(target, arrivals, deadline_s=args.deadline))
        rows += summarise(outcomes, server=args.server, rate_per_s=rate, seconds=seconds)
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
