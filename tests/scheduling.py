"""A scheduler on its own: jobs in short, and a clock that only calls move."""

import heapq
import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

from fewstep.runtime.schedule.costs import Costs
from fewstep.runtime.schedule.jobs import Accepted, Ended, Job, Lane, Prepare, RowCall, Stepped
from fewstep.runtime.schedule.scheduler import Scheduler

PLAIN, PAIR = RowCall("m"), RowCall("m", evaluations=2)
STEERED = RowCall("m", "denoiser+control")
PROMPT = Prepare("text", "m", "text")
FREE = {1: 0.01, 8: 0.01}
RECORDED = Path(__file__).parents[1] / "docs" / "performance"


def make(costs=None, max_queue=100, **lane):
    return Scheduler({"m": Lane(**{"max_batch": 8, **lane})}, costs or Costs(), max_queue=max_queue)


def job(name, steps=1, **settings):
    return Job(**{"id": name, "model": "m", "rows": (PLAIN,) * steps, **settings})


def measured(**per_role):
    """Costs from role -> {batch: seconds}; roles not named cost 10 ms each."""
    costs = Costs()
    for role in ("text", "denoiser", "denoiser+control", "decoder"):
        for size, seconds in per_role.get(role.replace("+", "_"), {1: 0.01}).items():
            costs.record(("m", role), size, seconds)
    return costs


def recorded(name, engine):
    """Costs that were measured on a real bundle and engine, from the pages of measured performance."""
    costs = Costs()
    for row in json.loads((RECORDED / f"{name}.json").read_text())["components"]:
        if row["engine"] == engine:
            costs.record(("m", row["role"]), row["batch"], row["p50_ms"] / 1000)
    return costs


def run(scheduler, work, now_s=0.0):
    return scheduler.complete(work, [None] * len(work.items), now_s)


def drain(scheduler, now_s=0.0):
    """Run everything to the end; (kind, ids) of each call."""
    calls = []
    while (work := scheduler.next()) is not None:
        calls.append((work.kind, [item.id for item in work.items]))
        run(scheduler, work, now_s)
    return calls


def order_of_ends(scheduler):
    ends = []
    while (work := scheduler.next()) is not None:
        ends += [event.id for event in run(scheduler, work) if isinstance(event, Ended)]
    return ends


@dataclass
class Life:
    """A request in simulated time. `ended_s` is None where it was refused or expired."""

    job: Job
    arrival_s: float
    predicted_s: float | None = None
    ended_s: float | None = None
    reason: str = "refused"


def poisson(mix, rate_per_s, count, seed):
    """(arrival, job) by steps -> share; about 0.5 of the prompts are new."""
    rng, now = random.Random(seed), 0.0
    out = []
    for number in range(count):
        now += rng.expovariate(rate_per_s)
        steps = rng.choices(list(mix), list(mix.values()))[0]
        before = (PROMPT,) if rng.random() < 0.5 else ()
        out.append((now, job(str(number), steps, before=before)))
    return out


def simulate(
    costs, arrivals, *, max_queue=10_000, jitter=0.05, seed=1, lane=Lane(max_batch=8), deadline=None, call_s=None  # noqa: B008
):  # fmt: skip
    """Serve (arrival, job) pairs on a clock that calls move by what the table says, give or take `jitter`.

    deadline: seconds from arrival for every job. call_s: what a call takes, in place of the table.
    """
    scheduler = Scheduler({"m": lane}, costs, max_queue=max_queue)
    rng, waiting = random.Random(seed), [(at, k, asked) for k, (at, asked) in enumerate(arrivals)]
    heapq.heapify(waiting)
    lives, now = {}, 0.0

    def end(event):
        lives[event.id].ended_s, lives[event.id].reason = now, event.reason

    def arrive(until_s):
        while waiting and waiting[0][0] <= until_s:
            at, _, asked = heapq.heappop(waiting)
            asked = asked if deadline is None else replace(asked, deadline_s=at + deadline)
            lives[asked.id] = Life(asked, at)
            decision = scheduler.submit(asked, at)
            if isinstance(decision, Accepted):
                lives[asked.id].predicted_s = decision.finish_s

    while waiting or scheduler.live:
        for event in scheduler.expire(now):
            end(event)
        work = scheduler.next(now)
        if work is None:
            now = max(now, waiting[0][0]) if waiting else now
            arrive(now)
            continue
        told = scheduler._pricing.call_s(work.model, work.priced, work.size) if call_s is None else call_s(work)
        took = told * max(0.2, rng.gauss(1.0, jitter))
        now += took
        arrive(now)
        for event in run(scheduler, work, now):
            if not isinstance(event, Stepped):
                end(event)
    return list(lives.values())
