"""Sending traffic to a server on this machine, open loop or closed, and what came of every request."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from .load_plan import Arrival, Kind, prompt

if TYPE_CHECKING:
    import aiohttp


@dataclass(frozen=True)
class Outcome:
    """What came of one request. kind: "ok", "rejected" (429 or 503), "late" (504, or still out at the end), "failed".

    latency_s: from its planned arrival. timings: what the server said of its parts, where it did. deadline_s: by
    when it was wanted, from its planned arrival.
    """

    steps: int
    kind: str
    latency_s: float
    timings: Mapping[str, float] = field(default_factory=dict)
    deadline_s: float | None = None

    @property
    def good(self) -> bool:
        """It came, and in time where it had a deadline."""
        return self.kind == "ok" and (self.deadline_s is None or self.latency_s <= self.deadline_s)


@dataclass(frozen=True)
class Target:
    """A server: its URL, its models' names by bundle (None: its default), and the route and key to use.

    native: it takes `deadline_s` and tells timings, at /v1/generate.
    """

    url: str
    models: tuple[str | None, ...] = (None,)
    native: bool = False
    key: str | None = None
    timeout_s: float = 60.0

    @property
    def route(self) -> str:
        return "/v1/generate" if self.native else "/v1/images/generations"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def body(self, arrival: Arrival, left_s: float | None) -> dict[str, Any]:
        steps = "steps" if self.native else "num_inference_steps"
        body = {"prompt": prompt(arrival.number), steps: arrival.kind.steps, "seed": arrival.number}
        if (model := self.models[arrival.kind.bundle]) is not None:
            body["model"] = model
        if self.native and left_s is not None:
            body["deadline_s"] = left_s
        return body


async def send_traffic(
    target: Target, arrivals: Sequence[Arrival], *, deadline_s: float | None = None, patience_s: float | None = None
) -> list[Outcome]:
    """Send each request at its time, whatever became of the ones before, and wait for all of them.

    deadline_s: from the planned arrival; the server is told what is left of it. patience_s: how long after the last
    arrival those still out are given up.
    """
    async with _client(target) as client:
        began_s = time.perf_counter()
        tasks = []
        for arrival in arrivals:
            await asyncio.sleep(max(0.0, began_s + arrival.at_s - time.perf_counter()))
            tasks.append(asyncio.create_task(_send(client, target, arrival, began_s, deadline_s)))
        if tasks and patience_s is not None:
            await asyncio.wait(tasks, timeout=patience_s)
        now_s = time.perf_counter() - began_s
        for task in tasks if patience_s is not None else ():
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
    return [
        outcome
        if isinstance(outcome, Outcome)
        else Outcome(a.kind.steps, "late", now_s - a.at_s, deadline_s=deadline_s)
        for a, outcome in zip(arrivals, done, strict=True)
    ]


async def send_in_turn(
    target: Target, kinds: Sequence[Kind], *, at_once: int, first: int
) -> tuple[list[Outcome], float]:
    """Closed loop: `at_once` requests are always out until all of `kinds` are answered; (outcomes, seconds).

    first: the number of the first request, so that no prompt comes twice.
    """
    numbered: Iterator[tuple[int, Kind]] = iter(enumerate(kinds, first))
    found: list[Outcome] = []

    async def one_after_another(client: "aiohttp.ClientSession") -> None:
        for number, kind in numbered:
            began_s = time.perf_counter()
            found.append(await _send(client, target, Arrival(0.0, kind, number), began_s, None))

    async with _client(target) as client:
        began_s = time.perf_counter()
        await asyncio.gather(*[one_after_another(client) for _ in range(at_once)])
        return found, time.perf_counter() - began_s


def send_alone(target: Target, kinds: Sequence[Kind], *, first: int) -> list[Outcome]:
    """One request after another on one connection, by the standard library's client: its own work is small beside
    that of the client which sends traffic, so what is measured is the server.

    first: as in `send_in_turn`.
    """
    headers = {"Content-Type": "application/json", **target.headers}
    connection = HTTPConnection(urlsplit(target.url).netloc, timeout=target.timeout_s)
    found = []
    try:
        for number, kind in enumerate(kinds, first):
            body = json.dumps(target.body(Arrival(0.0, kind, number), None)).encode()
            began_s = time.perf_counter()
            connection.request("POST", target.route, body, headers)
            reply = connection.getresponse()
            answer = reply.read()
            latency_s = time.perf_counter() - began_s
            if reply.status != 200:
                found.append(Outcome(kind.steps, "failed", latency_s))
                continue
            timings = json.loads(answer)["timings"] if target.native else {}
            found.append(Outcome(kind.steps, "ok", latency_s, timings))
    finally:
        connection.close()
    return found


@asynccontextmanager
async def _client(target: Target) -> AsyncIterator["aiohttp.ClientSession"]:
    """By aiohttp, of the clients the one that takes the least of the machine which the server is measured on."""
    import aiohttp

    async with aiohttp.ClientSession(
        target.url,
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=target.timeout_s),
        headers=target.headers,
        timeout=aiohttp.ClientTimeout(target.timeout_s),
    ) as client:
        yield client


async def _send(
    client: "aiohttp.ClientSession", target: Target, arrival: Arrival, began_s: float, deadline_s: float | None
) -> Outcome:
    import aiohttp

    due_s = began_s + arrival.at_s
    left_s = None if deadline_s is None else max(1e-3, due_s + deadline_s - time.perf_counter())
    timings: Mapping[str, float] = {}
    try:
        body = target.body(arrival, left_s)
        async with client.post(target.route, json=body, allow_redirects=False) as reply:
            answer = await reply.read()
        kind = {200: "ok", 429: "rejected", 503: "rejected", 504: "late"}.get(reply.status, "failed")
        if kind == "failed" and deadline_s is not None and b"deadline_s" in answer:
            kind = "rejected"  # refused at the door: it could not be in time even alone
        if kind == "ok" and target.native:
            timings = json.loads(answer)["timings"]
    except (aiohttp.ClientError, TimeoutError):
        kind = "failed"
    return Outcome(arrival.kind.steps, kind, time.perf_counter() - due_s, timings, deadline_s)
