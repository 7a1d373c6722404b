"""Load side by side: the same arrivals to this server, to first-come-first-served batching and to plain diffusers.

Each server is a process of its own, and only one is sent anything at a time. Rounds alternate, so that a machine which
slows down slows all of them.
"""

import asyncio
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from .load_plan import MIXED, OVERLOAD, STEADY, WORKLOADS, Kind, Workload, in_shares, plan_arrivals
from .load_report import DIFFUSERS, FIRST_COME, OURS, claims, overhead_ms, summarise
from .load_servers import Server, started
from .load_traffic import Outcome, send_alone, send_in_turn, send_traffic

AT_ONCE = 24
"""Requests that are always out while capacity is measured."""
DEADLINE_FACTOR = 10.0
"""The deadline is so many times what the longest student request takes alone."""
ROUNDS = 2


@dataclass(frozen=True)
class Plan:
    """bundles: the student, and the teacher if there is one. seconds: of one round of a workload of weight 1."""

    bundles: tuple[str, ...]
    engine: str = "auto"
    threads: int = 1
    seconds: float = 7.0
    seed: int = 0
    diffusers: bool = True

    @property
    def workloads(self) -> list[Workload]:
        return [w for w in WORKLOADS if max(kind.bundle for kind in w.kinds) < len(self.bundles)]


def compare(plan: Plan) -> dict[str, Any]:
    """The report: machine, engines, costs, capacity, rows and claims.

    Errors: `EngineUnavailable` where a server does not start.
    """
    from fewstep.runtime.measurement import machine_facts

    arguments = [*plan.bundles, "--engine", plan.engine]
    module = "fewstep.server.load_servers"
    with (
        started(OURS, module, ["earliest-due", *arguments], threads=plan.threads, native=True) as ours,
        started(FIRST_COME, module, ["first-come", *arguments], threads=plan.threads, native=True) as plain,
    ):
        alone, overhead = _alone(ours)
        deadline_s = DEADLINE_FACTOR * max(alone.values())
        capacity = _capacities(plan, [ours, plain])
        rows = []
        for workload in plan.workloads:
            servers = [ours] if workload is STEADY else [ours, plain]
            rows += _run(plan, workload, servers, capacity[workload.name], deadline_s)
        steady = _capacity(plan, MIXED, ours, first=60_000) / capacity[MIXED.name][OURS]
        said = ours.said
    if plan.diffusers:
        with started(
            DIFFUSERS, "fewstep.server.load_diffusers", [plan.bundles[0]], threads=plan.threads, native=False
        ) as usual:
            rows += _run(plan, STEADY, [usual], capacity[STEADY.name], deadline_s)
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
        "speed_kept": steady,
        "rows": rows,
        "claims": claims(rows, mine, overhead),
    }


def _alone(server: Server) -> tuple[dict[int, float], float]:
    """(median seconds of a request with nothing else running, by step count; what of it is overhead, ms)."""
    _say("one request at a time")
    found: dict[int, list[Outcome]] = {}
    for number, kind in enumerate(MIXED.kinds):
        found[kind.steps] = send_alone(server.target, [kind] * 25, first=20_000 + 100 * number)[5:]
    alone = {steps: median(o.latency_s for o in outcomes) for steps, outcomes in found.items()}
    return alone, overhead_ms([o for outcomes in found.values() for o in outcomes])


def _capacities(plan: Plan, servers: Sequence[Server]) -> dict[str, dict[str, float]]:
    """Requests per second with the queue never empty, by workload and server; the same mix is measured once."""
    found: dict[tuple[tuple[Kind, float], ...], dict[str, float]] = {}
    for workload in plan.workloads:
        if workload.mix in found:
            continue
        _say(f"capacity for {workload.name}")
        found[workload.mix] = {server.name: _capacity(plan, workload, server) for server in servers}
    return {workload.name: found[workload.mix] for workload in plan.workloads}


def _capacity(plan: Plan, workload: Workload, server: Server, first: int = 40_000) -> float:
    """Requests per second of one server, of as many as take a third of a round or more; first: as `send_in_turn`."""
    count = 2 * AT_ONCE
    while True:
        kinds = in_shares(workload.mix, count)
        outcomes, seconds = asyncio.run(send_in_turn(server.target, kinds, at_once=AT_ONCE, first=first))
        if seconds >= plan.seconds / 3:
            return sum(o.kind == "ok" for o in outcomes) / seconds
        first += count
        count = max(2 * count, min(8 * count, round(count * plan.seconds / 2 / seconds)))


def _run(
    plan: Plan, workload: Workload, servers: Sequence[Server], capacity: Mapping[str, float], deadline_s: float
) -> list[dict[str, Any]]:
    """Rows of one workload: every server gets the same arrivals, in rounds that alternate.

    The rate is a share of what the slower of the compared servers can do; at overload, of what ours can.
    """
    basis = capacity[OURS] if workload is OVERLOAD else min(capacity.values())
    rate, seconds = workload.load * basis, workload.weight * plan.seconds
    limit = deadline_s if workload.deadlines else None
    found: dict[str, list[Outcome]] = {server.name: [] for server in servers}
    for turn in range(ROUNDS):
        arrivals = plan_arrivals(rate, seconds, workload.mix, plan.seed + turn)
        for server in servers if turn % 2 == 0 else reversed(servers):
            _say(f"{workload.name}: {len(arrivals)} requests at {rate:.1f} per second to {server.name}")
            patience = None if limit is None else 2 * limit
            found[server.name] += asyncio.run(
                send_traffic(server.target, arrivals, deadline_s=limit, patience_s=patience)
            )
    rows = []
    for name, outcomes in found.items():
        described = summarise(outcomes, server=name, rate_per_s=rate, seconds=ROUNDS * seconds, deadline_s=limit)
        rows += [{"workload": workload.name, "seconds": ROUNDS * seconds, **row} for row in described]
    return rows


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
