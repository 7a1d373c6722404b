"""Loss curves of a run, from its metrics file."""

import json
from pathlib import Path


def plot_losses(metrics: Path, picture: Path) -> None:
    """One panel per player, raw and smoothed; skipped where matplotlib (extra `train`) is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in metrics.read_text().splitlines():
        row = json.loads(line)
        if not row["skipped"]:
            curves.setdefault(row["player"], []).append((row["step"], row["loss"]))
    if not curves:
        return
    figure = Figure(figsize=(5 * len(curves), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (player, points) in enumerate(sorted(curves.items())):
        axes = figure.add_subplot(1, len(curves), i + 1)
        steps, losses = zip(*points, strict=True)
        axes.plot(steps, losses, linewidth=0.4, alpha=0.5)
        axes.plot(steps, _smooth(losses), linewidth=1.5)
        axes.set(title=player, xlabel="step", ylabel="loss")
        if min(losses) > 0:
            axes.set_yscale("log")
    figure.savefig(picture, dpi=100)


def _smooth(values: tuple[float, ...], memory: float = 0.97) -> list[float]:
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = memory * mean + (1 - memory) * value, memory * weight + (1 - memory)
        out.append(mean / weight)
    return out
