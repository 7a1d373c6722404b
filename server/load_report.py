"""Rows, claims, charts and tables of load: from outcomes, measured or simulated, to what is said of them."""

from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any

from fewstep.runtime.bench.charts import bars

from .load_plan import WORKLOADS
from .load_traffic import Outcome

OURS, FIRST_COME, DIFFUSERS = "fewstep", "first-come", "diffusers"


def summarise(outcomes: Sequence[Outcome], *, server: str, rate_per_s: float, seconds: float) -> list[dict[str, Any]]:
    """One row per step count, and one for all together where there are several.

    goodput counts pictures within the deadline (or all that came, without one) per second of traffic. A deadline is
    missed by a request that was let in and not answered in time; percentiles are over the pictures that came.
    """
    groups: list[tuple[Any, list[Outcome]]] = [
        (steps, [o for o in outcomes if o.steps == steps]) for steps in sorted({o.steps for o in outcomes})
    ]
    if len(groups) != 1:
        groups.append(("all", list(outcomes)))
    return [_row(steps, some, server, rate_per_s, seconds) for steps, some in groups]


def in_rounds(
    rounds: Sequence[tuple[float, Sequence[Outcome]]], *, server: str, rate_per_s: float, seconds: float,
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of several rounds together, each with what the single rounds gave.

    rounds: the machine's speed then, as a share of that at the start, and what came. seconds: of each round.
    """

    def of(outcomes: Sequence[Outcome], seconds: float) -> list[dict[str, Any]]:
        return summarise(outcomes, server=server, rate_per_s=rate_per_s, seconds=seconds)

    rows = of([outcome for _, outcomes in rounds for outcome in outcomes], len(rounds) * seconds)
    for speed, outcomes in rounds:
        single = {row["steps"]: row for row in of(outcomes, seconds)}
        for row in rows:
            if found := single.get(row["steps"]):
                kept = {name: found[name] for name in ("p99_ms", "mean_ms", "goodput_per_s")}
                row.setdefault("rounds", []).append({"speed": speed, **kept})
    return rows


def _row(steps: Any, some: Sequence[Outcome], server: str, rate_per_s: float, seconds: float) -> dict[str, Any]:
    came = [o for o in some if o.kind == "ok"]
    times = sorted(o.latency_s for o in came)
    good = sum(o.good for o in came)
    let_in = [o for o in some if o.kind in ("ok", "late")]
    row: dict[str, Any] = {
        "server": server,
        "rate_per_s": rate_per_s,
        "steps": steps,
        "sent": len(some),
        "ok": len(times),
        "rejected": sum(o.kind == "rejected" for o in some),
        "failed": sum(o.kind == "failed" for o in some),
        **{f"p{p}_ms": percentile_ms(times, p) for p in (50, 95, 99)},
        "mean_ms": 1e3 * mean(times) if times else None,
        "goodput_per_s": good / seconds,
        "deadline_missed": len(let_in) - good,
    }
    told = [o.timings for o in came if o.timings]
    if told:
        row["prediction_error"] = prediction_error(told)
        row["decode_ms"] = 1e3 * median(t["decode_s"] for t in told)
        row["encode_ms"] = 1e3 * median(t["encode_s"] for t in told)
    return row


def prediction_error(told: Sequence[Mapping[str, float]]) -> float | None:
    """Median of |predicted - real| / real of the time from acceptance to the finished picture."""
    errors = []
    for timings in told:
        if timings.get("predicted_s") is not None:
            real_s = timings["total_s"] - timings["encode_s"]
            errors.append(abs(timings["predicted_s"] - real_s) / real_s)
    return median(errors) if errors else None


def overhead_ms(outcomes: Sequence[Outcome]) -> float:
    """Median of what a client waits beyond the engine calls and the encoding of its picture, nothing else running."""
    stages = ("text_s", "denoise_s", "decode_s", "encode_s")
    return 1e3 * median(o.latency_s - sum(o.timings[stage] for stage in stages) for o in outcomes if o.kind == "ok")


def percentile_ms(times: Sequence[float], p: int) -> float | None:
    """Nearest rank of sorted seconds; None without any."""
    return 1e3 * times[max(0, -(-p * len(times) // 100) - 1)] if times else None


def claims(
    rows: Sequence[Mapping[str, Any]], capacity: Mapping[str, float], overhead: float | None
) -> list[dict[str, Any]]:
    """What is wanted of the server, and what was found: {"claim", "found", "wanted", "ok"}. Those without data are
    left out."""

    def of(workload: str, server: str, steps: Any = "all") -> Mapping[str, Any] | None:
        same = [r for r in rows if (r["workload"], r["server"]) == (workload, server)]
        return next((r for r in same if r["steps"] == steps or len(same) == 1), None)

    found: list[dict[str, Any]] = []

    def say(claim: str, value: float, wanted: float, *, least: bool) -> None:
        found.append(
            {"claim": claim, "found": value, "wanted": wanted, "ok": value >= wanted if least else value <= wanted}
        )

    def ratio(workload: str, steps: Any, what: str) -> float | None:
        """The median over the rounds, where there were several."""
        ours, other = of(workload, OURS, steps), of(workload, FIRST_COME, steps)
        if not ours or not other:
            return None
        pairs = zip(ours.get("rounds", [ours]), other.get("rounds", [other]), strict=True)
        return median([b[what] / a[what] for a, b in pairs if a[what] and b[what]] or [0.0]) or None

    if value := ratio("mixed", 1, "p99_ms"):
        say("mixed: p99 of 1-step requests, first-come over ours", value, 2.0, least=True)
    if value := ratio("mixed", "all", "mean_ms"):
        say("mixed: mean latency, ours over first-come", 1 / value, 0.8, least=False)
    if value := ratio("teachers", "all", "mean_ms"):
        say("teachers: mean latency, first-come over ours", value, 2.0, least=True)
    for server in (OURS, FIRST_COME):
        if row := of("overload", server):
            rounds = row.get("rounds", [{**row, "speed": 1.0}])
            share = median(r["goodput_per_s"] / (capacity["overload"] * r["speed"]) for r in rounds)
            if server == OURS:
                say("overload: goodput over capacity", share, 0.9, least=True)
            else:
                found.append({"claim": "overload: goodput of first-come over capacity", "found": share})
    ours = of("steady", OURS)
    if ours and (plain := of("steady", DIFFUSERS)):
        most = max(plain["goodput_per_s"], 1.0 / plain["seconds"])  # none in time counts as one
        say("steady: goodput, ours over diffusers", ours["goodput_per_s"] / most, 3.0, least=True)
    if ours:
        let_in = ours["sent"] - ours["rejected"] - ours["failed"]
        say("steady: deadlines missed of those let in", ours["deadline_missed"] / max(1, let_in), 0.01, least=False)
    if ours and ours.get("prediction_error") is not None:
        say("steady: median error of the predicted finish", ours["prediction_error"], 0.15, least=False)
    if overhead is not None:
        say("p50 ms beyond engine, decode and encoding", overhead, 3.0, least=False)
    if value := ratio("uniform", 1, "p99_ms"):
        found.append({"claim": "uniform: p99, first-come over ours (nothing to gain)", "found": value})
    return found


def charts(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """SVG by name: for each workload the 99th percentile by class and server; and goodput under deadlines."""
    found = {}
    for workload in WORKLOADS:
        groups: dict[str, dict[str, float]] = {}
        for row in rows:
            if row["workload"] == workload.name and row["p99_ms"] is not None:
                groups.setdefault(str(row["steps"]), {})[row["server"]] = row["p99_ms"]
        if groups and not workload.deadlines:
            found[f"{workload.name}-p99"] = bars(f"99th percentile of latency: {workload.about}", groups, y="ms")
    goodput: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["workload"] in ("steady", "overload") and row["steps"] == "all":
            goodput.setdefault(row["workload"], {})[row["server"]] = row["goodput_per_s"]
    if goodput:
        found["goodput"] = bars("pictures within their deadline per second", goodput, y="per second")
    return found


def markdown(report: Mapping[str, Any]) -> str:
    """The claims and every row, as the page shows them."""
    lines = ["| claim | wanted | found | |", "| --- | ---: | ---: | --- |"]
    for claim in report["claims"]:
        wanted = f"{claim['wanted']:g}" if "wanted" in claim else ""
        verdict = {True: "met", False: "missed", None: ""}[claim.get("ok")]
        lines.append(f"| {claim['claim']} | {wanted} | {claim['found']:.3g} | {verdict} |")
    if speeds := report.get("speeds"):
        told = f"{min(speeds):.2f} to {max(speeds):.2f} of that at the start; the rates follow it."
        lines += ["", f"Ratios are medians over the pairs of rounds. The machine's speed before each pair was {told}"]
    for workload in WORKLOADS:
        rows = [row for row in report["rows"] if row["workload"] == workload.name]
        if rows:
            rate = rows[0]["rate_per_s"]
            lines += ["", f"**{workload.name}**: {workload.about}; {rate:.1f} requests per second.", ""]
            lines += _rows(rows)
    return "\n".join(lines) + "\n"


_COLUMNS = (
    ("server", "server"), ("requests", "steps"), ("sent", "sent"), ("ok", "ok"), ("refused", "rejected"),
    ("p50 ms", "p50_ms"), ("p95 ms", "p95_ms"), ("p99 ms", "p99_ms"), ("mean ms", "mean_ms"),
    ("goodput /s", "goodput_per_s"), ("missed", "deadline_missed"), ("prediction off by", "prediction_error"),
    ("decode ms", "decode_ms"), ("encode ms", "encode_ms"),
)  # fmt: skip


def _rows(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| " + " | ".join(head for head, _ in _COLUMNS) + " |",
        "| --- | --- " + "| ---: " * (len(_COLUMNS) - 2) + "|",
    ]
    for row in rows:
        lines.append("| " + " | ".join(_cell(name, row.get(name)) for _, name in _COLUMNS) + " |")
    return lines


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name == "prediction_error":
        return f"{100 * value:.0f} %"
    return f"{value:.1f}" if isinstance(value, float) else str(value)
