"""The same workloads and claims on a simulated clock: real scheduling policies, engine calls that take recorded times.

It answers in seconds what `fewstep bench load` measures in minutes, for a machine whose costs are known, and always the
same. There is no HTTP, no text cache and no picture encoding in it.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fewstep.runtime.engine import TEXT
from fewstep.runtime.schedule.costs import Costs
from fewstep.runtime.schedule.first_come import FirstCome
from fewstep.runtime.schedule.jobs import Job, Lane, Prepare, RowCall, Work
from fewstep.runtime.schedule.pricing import Pricing
from fewstep.runtime.schedule.scheduler import Scheduler
from fewstep.runtime.schedule.simulation import Passage, simulate

from .load_plan import MIXED, OVERLOAD, WORKLOADS, Arrival, Kind, Workload, in_shares, plan_arrivals
from .load_report import FIRST_COME, OURS, claims, summarise
from .load_traffic import Outcome

SECONDS = 120.0
LANE = Lane(max_batch=16)
JITTER = 0.05
"""Standard deviation of a call's time over what the table says."""


def simulated(
    report: Mapping[str, Any], *, seconds: float = SECONDS, seed: int = 0, among: Sequence[Workload] = WORKLOADS
) -> dict[str, Any]:
    """A report as `load_compare.compare` makes it, of the costs that one has recorded."""
    models = tuple(report["engines"])
    table = [(model, role, known) for model, role, known in report["costs"]]
    stage = Stage(models, table, seed)
    workloads = [w for w in among if max(kind.bundle for kind in w.kinds) < len(models)]
    capacity = {w.name: {name: stage.capacity(policy, w) for name, policy in POLICIES.items()} for w in workloads}
    deadline_s = 10.0 * max(stage.alone_s(kind) for kind in MIXED.kinds)
    rows = []
    for workload in workloads:
        found = capacity[workload.name]
        rate = workload.load * (found[OURS] if workload is OVERLOAD else min(found.values()))
        limit = deadline_s if workload.deadlines else None
        arrivals = plan_arrivals(rate, seconds * workload.weight, workload.mix, seed)
        for name, policy in POLICIES.items():
            outcomes = stage.run(policy, arrivals, limit)
            length = seconds * workload.weight
            for row in summarise(outcomes, server=name, rate_per_s=rate, seconds=length):
                rows.append({"workload": workload.name, "seconds": length, **row})
    kept = ("machine", "bundles", "engines", "threads", "costs")
    return {
        "kind": "load, simulated",
        **{name: report[name] for name in kept if name in report},
        "deadline_ms": 1e3 * deadline_s,
        "capacity_per_s": capacity,
        "rows": rows,
        "claims": claims(rows, {name: found[OURS] for name, found in capacity.items()}, None),
    }


POLICIES: dict[str, type[Any]] = {OURS: Scheduler, FIRST_COME: FirstCome}


class Stage:
    """Recorded costs, and requests of each class as jobs on them. models: by bundle number, as in `Kind`."""

    def __init__(self, models: Sequence[str], table: Sequence[tuple[str, str, Sequence[Any]]], seed: int) -> None:
        self.models, self._table, self._seed = models, table, seed

    def costs(self) -> Costs:
        costs = Costs()
        for model, role, known in self._table:
            for size, seconds in known:
                costs.record((model, role), size, seconds)
        return costs

    def job(self, arrival: Arrival, deadline_s: float | None) -> Job:
        """A student's request is text, rows, decode; a teacher's rows and texts are pairs, for guidance."""
        model, pair = self.models[arrival.kind.bundle], 1 + arrival.kind.bundle
        return Job(
            id=str(arrival.number),
            model=model,
            before=(Prepare(TEXT, model, TEXT, pair),),
            rows=(RowCall(model, evaluations=pair),) * arrival.kind.steps,
            deadline_s=None if deadline_s is None else arrival.at_s + deadline_s,
        )

    def run(self, policy: type[Any], arrivals: Sequence[Arrival], deadline_s: float | None) -> list[Outcome]:
        jobs = [(arrival.at_s, self.job(arrival, deadline_s)) for arrival in arrivals]
        return [_outcome(passage, deadline_s) for passage in self._simulate(policy, jobs)]

    def capacity(self, policy: type[Any], workload: Workload, count: int = 240) -> float:
        """Requests per second with all of them there at the start."""
        arrivals = [Arrival(0.0, kind, number) for number, kind in enumerate(in_shares(workload.mix, count))]
        passages = self._simulate(policy, [(0.0, self.job(arrival, None)) for arrival in arrivals])
        return count / max(passage.end_s for passage in passages)

    def alone_s(self, kind: Kind) -> float:
        (passage,) = self._simulate(Scheduler, [(0.0, self.job(Arrival(0.0, kind), None))])
        return passage.end_s

    def _simulate(self, policy: type[Any], jobs: Sequence[tuple[float, Job]]) -> list[Passage]:
        costs, lanes = self.costs(), dict.fromkeys(self.models, LANE)
        return simulate(policy(lanes, costs, max_queue=100_000), jobs, _timer(Pricing(lanes, costs), self._seed))


def _timer(pricing: Pricing, seed: int) -> Callable[[Work], float]:
    draw = random.Random(seed)
    return lambda work: pricing.call_s(work.model, work.priced, work.size) * max(0.2, draw.gauss(1.0, JITTER))


def _outcome(passage: Passage, deadline_s: float | None) -> Outcome:
    kind = {"finished": "ok", "rejected": "rejected", "expired": "late"}[passage.reason]
    latency_s = passage.end_s - passage.at_s
    timings: dict[str, float] = {}
    if passage.predicted_s is not None:
        told = passage.predicted_s - passage.at_s
        timings = {"total_s": latency_s, "encode_s": 0.0, "decode_s": 0.0, "predicted_s": told}
    return Outcome(len(passage.job.rows), kind, latency_s, timings, deadline_s)
