"""The report of `fewstep bench latency` as a table and as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import EngineUnavailable

COLOURS = {
    "diffusers": "#8c8c8c",
    "torch": "#4477aa",
    "onnx": "#228833",
    "openvino": "#ccbb44",
    "openvino-bf16": "#ee6677",
}
STAGE_COLOURS = {
    "text": "#88ccee",
    "denoiser": "#332288",
    "decode": "#117733",
    "encode": "#ddcc77",
    "overhead": "#cc6677",
}


def table(report: Mapping[str, Any]) -> str:
    """Lines for a terminal: the machine, one line per step count and contestant, what was left out."""
    machine = report["machine"]
    width, height = report["size"]
    lines = [
        f"{report['bundle']}, {width}x{height}, guidance {report['guidance']:g}: {report['measured']}",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, torch {machine['torch']}; "
        f"diffusers' {report['diffusers_pipeline']} in eager float32",
        "",
        f"{'steps':>5} {'engine':<14} {'p50 ms':>8} {'p95 ms':>8} {'p99 ms':>8} {'img/s':>7} {'vs diffusers':>13}   "
        "text denoise decode encode  rest",
    ]
    for peer in report["diffusers"]:
        lines.append(f"{_timing(peer, 'diffusers')} {'1.00x':>13}")
        for row in report["rows"]:
            if row["steps"] == peer["steps"]:
                shares = " ".join(f"{share:>6.0%}" for share in row["share"].values())
                lines.append(f"{_timing(row, row['engine'])} {row['vs_diffusers']:>12.2f}x {shares}")
    lines += [f"left out: {gone['steps']} steps, {gone['why']}" for gone in report["skipped"]]
    return "\n".join(lines)


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Left: median latency against steps. Right: where the time goes at the fewest steps.

    Errors: `EngineUnavailable` where matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EngineUnavailable("--plot needs matplotlib; pip install 'fewstep[train]'") from error
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


def _timing(row: Mapping[str, Any], name: str) -> str:
    times = " ".join(f"{row[key]:>8.1f}" for key in ("p50_ms", "p95_ms", "p99_ms"))
    return f"{row['steps']:>5} {name:<14} {times} {row['images_per_s']:>7.1f}"


def _curves(axes: Any, report: Mapping[str, Any]) -> None:
    from matplotlib.ticker import LogLocator

    curves = {"diffusers": [(p["steps"], p["p50_ms"]) for p in report["diffusers"]]}
    for row in report["rows"]:
        curves.setdefault(row["engine"], []).append((row["steps"], row["p50_ms"]))
    for name, points in curves.items():
        steps, times = zip(*sorted(points), strict=True)
        axes.plot(steps, times, marker="o", label=name, color=COLOURS.get(name))
    ticks = sorted({p["steps"] for p in report["diffusers"]})
    axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="median latency, ms")
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(True, which="major", alpha=0.3)
    axes.legend()


def _stages(axes: Any, report: Mapping[str, Any]) -> None:
    fewest = min(row["steps"] for row in report["rows"])
    rows = [row for row in report["rows"] if row["steps"] == fewest]
    names = [row["engine"] for row in rows]
    bottom = [0.0] * len(rows)
    for stage, colour in STAGE_COLOURS.items():
        heights = [row["share"][stage] * row["p50_ms"] for row in rows]
        axes.bar(names, heights, bottom=bottom, label=stage, color=colour)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axes.set(ylabel="ms", title=f"{fewest} step{'s' if fewest > 1 else ''}")
    axes.legend()
