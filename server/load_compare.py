"""Load side by side: the same arrivals to this server, to first-come-first-served batching and to plain diffusers.

Each server is a process of its own, and only one is sent anything at a time. Rounds are short and alternate; before
each pair of them the machine's speed is measured anew, since shared machines change theirs within minutes, and the pair
is sent the same share of what the machine can do at that moment. Comparisons are medians over the pairs.
"""

import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from fewstep.runtime.errors import EngineUnavailable

from .load_plan import MIXED, OVERLOAD, STEADY, WORKLOADS, Kind, Numbers, Workload, in_shares, plan_arrivals
from .load_report import DIFFUSERS, FIRST_COME, OURS, claims, in_rounds, overhead_ms
from .load_servers import Server, started
from .load_traffic import Outcome, send_alone, send_in_turn, send_traffic

AT_ONCE = 24
"""Requests that are always out while capacity is measured."""
DEADLINE_FACTOR = 10.0
"""The deadline is so many times what the longest student request takes alone."""
ROUNDS = 4
IDLE_FACTOR, IDLE_TRIES = 5.0, 200
"""A server is idle again when a request takes at most so many times what it takes alone."""


@dataclass(frozen=True)
class Plan:
    """bundles: the student, and the teacher if there is one. seconds: of one round of a workload of weight 1."""

    bundles: tuple[str, ...]
    engine: str = "auto"
    threads: int = 1
    seconds: float = 5.0
    seed: int = 0
    diffusers: bool = True

    @property
    def workloads(self) -> list[Workload]:
        return [w for w in WORKLOADS if max(kind.bundle for kind in w.kinds) < len(self.bundles)]


def compare(plan: Plan) -> dict[str, Any]:
    """The report: machine, engines, costs, capacity, rows and claims.

    Errors: `EngineUnavailable` where a server does not start.
    """
    from fewstep.runtime.engines.measurement import machine_facts

    arguments = [*plan.bundles, "--engine", plan.engine]
    module = "fewstep.server.load_servers"
    with ExitStack() as running:

        def start(name: str, policy: str) -> Server:
            return running.enter_context(started(name, module, [policy, *arguments], threads=plan.threads, native=True))

        ours, plain = start(OURS, "earliest-due"), start(FIRST_COME, "first-come")
        numbers = Numbers()
        alone, overhead = _alone(ours, numbers)
        deadline_s = DEADLINE_FACTOR * max(alone.values())
        capacity = _capacities(plan, [ours, plain], numbers)
        usual = []
        if plan.diffusers:
            module = "fewstep.server.load_diffusers"
            server = started(DIFFUSERS, module, [plan.bundles[0]], threads=plan.threads, native=False)
            usual.append(running.enter_context(server))
        quickest = {server.name: _quickest(server, numbers) for server in (ours, plain, *usual)}
        said, rows, speeds = ours.said, [], []

        def speed() -> float:
            """What ours can do now over what it could at the start."""
            speeds.append(_capacity(plan, MIXED, ours, numbers) / capacity[MIXED.name][OURS])
            return speeds[-1]

        for workload in plan.workloads:
            servers = [ours, *usual] if workload is STEADY else [ours, plain]
            rows += _run(plan, workload, servers, capacity[workload.name], deadline_s, speed, numbers, quickest)
    mine = {name: found[OURS] for name, found in capacity.items()}
    return {
        "kind": "load",
        "machine": machine_facts(),
        "bundles": list(plan.bundles),
        "engines": said["engines"],
        "threads": plan.threads,
        "costs": said["costs"],
        "alone_ms": {str(steps): 1e3 * seconds for steps, seconds in alone.items()},
        "overhead_ms": overhead,
        "deadline_ms": 1e3 * deadline_s,
        "capacity_per_s": capacity,
        "speeds": speeds,
        "rows": rows,
        "claims": claims(rows, mine, overhead),
    }


def _alone(server: Server, numbers: Numbers) -> tuple[dict[int, float], float]:
    """(median seconds of a request with nothing else running, by step count; what of it is overhead, ms)."""
    _say("one request at a time")
    found: dict[int, list[Outcome]] = {}
    for kind in MIXED.kinds:
        found[kind.steps] = send_alone(server.target, [kind] * 25, first=numbers.take(25))[5:]
    alone = {steps: median(o.latency_s for o in outcomes) for steps, outcomes in found.items()}
    return alone, overhead_ms([o for outcomes in found.values() for o in outcomes])


def _capacities(plan: Plan, servers: Sequence[Server], numbers: Numbers) -> dict[str, dict[str, float]]:
    """Requests per second with the queue never empty, by workload and server; the same mix is measured once."""
    found: dict[tuple[tuple[Kind, float], ...], dict[str, float]] = {}
    for workload in plan.workloads:
        if workload.mix in found:
            continue
        _say(f"capacity for {workload.name}")
        found[workload.mix] = {server.name: _capacity(plan, workload, server, numbers) for server in servers}
    return {workload.name: found[workload.mix] for workload in plan.workloads}


def _capacity(plan: Plan, workload: Workload, server: Server, numbers: Numbers) -> float:
    """Requests per second of one server, of as many as take a third of a round or more."""
    count = 2 * AT_ONCE
    while True:
        kinds = in_shares(workload.mix, count)
        outcomes, seconds = asyncio.run(send_in_turn(server.target, kinds, at_once=AT_ONCE, first=numbers.take(count)))
        if seconds >= plan.seconds / 3:
            return sum(o.kind == "ok" for o in outcomes) / seconds
        count = max(2 * count, min(8 * count, round(count * plan.seconds / 2 / seconds)))


def _run(
    plan: Plan, workload: Workload, servers: Sequence[Server], capacity: Mapping[str, float], deadline_s: float,
    speed: Callable[[], float], numbers: Numbers, quickest: Mapping[str, float],
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of one workload: every server gets the same arrivals, in rounds that alternate.

    The rate is a share of what the slower of the compared servers can do now; at overload, of what ours can. Deadlines
    follow the machine's speed as the rate does.
    """
    basis = capacity[OURS] if workload is OVERLOAD else min(capacity.values())
    seconds = workload.weight * plan.seconds
    rates: list[float] = []
    found: dict[str, list[tuple[float, list[Outcome]]]] = {server.name: [] for server in servers}
    for turn in range(ROUNDS):
        now = speed()
        rates.append(workload.load * basis * now)
        limit = deadline_s / now if workload.deadlines else None
        arrivals = plan_arrivals(rates[-1], seconds, workload.mix, plan.seed + turn, numbers.used)
        numbers.take(len(arrivals))
        for server in servers if turn % 2 == 0 else reversed(servers):
            _say(f"{workload.name}: {len(arrivals)} requests at {rates[-1]:.1f} per second to {server.name}")
            patience = None if limit is None else 2 * limit
            sent = send_traffic(server.target, arrivals, deadline_s=limit, patience_s=patience)
            found[server.name].append((now, asyncio.run(sent)))
            _until_idle(server, quickest[server.name], numbers)
    rows = []
    for name, rounds in found.items():
        for row in in_rounds(rounds, server=name, rate_per_s=mean(rates), seconds=seconds):
            rows.append({"workload": workload.name, "seconds": ROUNDS * seconds, **row})
    return rows


def _quickest(server: Server, numbers: Numbers) -> float:
    """The least seconds of a few requests alone."""
    return min(o.latency_s for o in send_alone(server.target, MIXED.kinds[:1] * 5, first=numbers.take(5)))


def _until_idle(server: Server, quickest_s: float, numbers: Numbers) -> None:
    """Wait until a server has done what its callers gave up on: plain diffusers goes on with all of it, and whoever is
    measured next on the same machine would have what it leaves."""
    for _ in range(IDLE_TRIES):
        (outcome,) = send_alone(server.target, MIXED.kinds[:1], first=numbers.take(1))
        if outcome.kind == "ok" and outcome.latency_s <= IDLE_FACTOR * quickest_s:
            return
    raise EngineUnavailable(f"the {server.name} server did not become idle; run it on a machine that is not busy")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
