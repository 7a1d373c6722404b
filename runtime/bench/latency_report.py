"""The report of `fewstep bench latency` as a table, and as a picture by matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import EngineUnavailable
from .contestants import STAGES

STAGE_COLOURS = dict(zip(STAGES, ("#88ccee", "#332288", "#117733", "#ddcc77", "#cc6677"), strict=True))


def table(report: Mapping[str, Any]) -> str:
    """Lines for a terminal: the machine, end to end, each network alone, what was left out."""
    machine = report["machine"]
    width, height = report["size"]
    lines = [
        f"{report['bundle']}, {width}x{height}, guidance {report['guidance']:g}: {report['measured']}",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, torch {machine['torch']}; "
        f"diffusers' {report['diffusers_pipeline']} in eager float32",
        "",
        *_end_to_end(report),
        *_alone(report),
    ]
    lines += [f"{name}: {note}" for name, notes in report["peer_notes"].items() for note in notes]
    return "\n".join([*lines, *map(left_out, report["skipped"])])


def left_out(gone: Mapping[str, Any]) -> str:
    """One entry of `skipped` as a line."""
    what = f"{gone['steps']} steps" if "steps" in gone else f"peer {gone['peer']}"
    return f"left out: {what}, {gone['why']}"


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Left: median latency against steps at the smallest batch. Right: where the time goes at the fewest steps.

    Errors: as `check_plot`.
    """
    check_plot()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _curves(left, report)
    _stages(right, report)
    machine = report["machine"]
    figure.suptitle(
        f"{report['bundle']}: prompt to PNG on {machine['cpu']}, {machine['threads']} thread(s)", fontsize=10
    )
    figure.savefig(path, dpi=150)


def check_plot() -> None:
    """Errors: `EngineUnavailable` where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise EngineUnavailable("--plot needs matplotlib; pip install 'fewstep[train]', or use --html") from error


def contestants(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every end-to-end row, peers first."""
    return [*report["diffusers"], *report["peers"], *report["rows"]]


def smallest_batch(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    least = min(row["batch"] for row in rows)
    return [row for row in rows if row["batch"] == least]


def _end_to_end(report: Mapping[str, Any]) -> list[str]:
    wide = max(14, *(len(row["engine"]) for row in contestants(report)))
    lines = [
        f"{'steps':>5} {'batch':>5} {'engine':<{wide}} {'p50 ms':>8} {'p95 ms':>8} {'p99 ms':>8} {'img/s':>7} "
        f"{'vs diffusers':>13}   text denoise decode encode  rest"
    ]
    for row in sorted(contestants(report), key=lambda row: (row["steps"], row["batch"])):
        times = " ".join(f"{row[key]:>8.1f}" for key in ("p50_ms", "p95_ms", "p99_ms"))
        shares = " ".join(f"{share:>6.0%}" for share in row.get("share", {}).values())
        line = f"{row['steps']:>5} {row['batch']:>5} {row['engine']:<{wide}} {times} {row['images_per_s']:>7.1f}"
        lines.append(f"{line} {row['vs_diffusers']:>12.2f}x {shares}".rstrip())
    return lines


def _alone(report: Mapping[str, Any]) -> list[str]:
    if "components" not in report:
        return []
    rows = report["components"]
    wide = max(14, *(len(row["engine"]) for row in rows))
    peak = ", ".join(f"{name} {speed:g} GFLOP/s" for name, speed in report["peak_gflop_per_s"].items())
    lines = ["", f"each network alone; matrix peak of this machine in this run: {peak}"]
    lines.append(
        f"{'role':<17} {'batch':>5} {'engine':<{wide}} {'p50 ms':>8} {'GFLOP':>8} {'GFLOP/s':>8} {'of peak':>8}"
    )
    for row in rows:
        share = "-" if row["fraction_of_peak"] is None else f"{row['fraction_of_peak']:.0%}"
        lines.append(
            f"{row['role']:<17} {row['batch']:>5} {row['engine']:<{wide}} {row['p50_ms']:>8.2f} {row['gflop']:>8.3f} "
            f"{row['gflop_per_s']:>8.1f} {share:>8}"
        )
    return lines


def _curves(axes: Any, report: Mapping[str, Any]) -> None:
    from matplotlib.ticker import LogLocator

    curves: dict[str, list[tuple[int, float]]] = {}
    for row in smallest_batch(contestants(report)):
        curves.setdefault(row["engine"], []).append((row["steps"], row["p50_ms"]))
    for name, points in curves.items():
        steps, times = zip(*sorted(points), strict=True)
        axes.plot(steps, times, marker="o", label=name, linestyle="-" if name in _engines(report) else "--")
    ticks = sorted({row["steps"] for row in report["rows"]})
    axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="median latency, ms")
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(True, which="major", alpha=0.3)
    axes.legend()


def _engines(report: Mapping[str, Any]) -> set[str]:
    return {row["engine"] for row in report["rows"]}


def _stages(axes: Any, report: Mapping[str, Any]) -> None:
    least = smallest_batch(report["rows"])
    fewest = min(row["steps"] for row in least)
    rows = [row for row in least if row["steps"] == fewest]
    names = [row["engine"] for row in rows]
    bottom = [0.0] * len(rows)
    for stage, colour in STAGE_COLOURS.items():
        heights = [row["share"][stage] * row["p50_ms"] for row in rows]
        axes.bar(names, heights, bottom=bottom, label=stage, color=colour)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axes.set(ylabel="ms", title=f"{fewest} step{'s' if fewest > 1 else ''}")
    axes.legend()
