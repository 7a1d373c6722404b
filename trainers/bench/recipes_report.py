"""The report of `fewstep bench recipes` as a markdown table, and as one picture of all samples."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .recipes import EVALUATIONS, STEPS, per_step

SIDE, REACH, DOT = 120, 2.6, 1
"""Pixels of a panel's side, how far from 0 it shows (deviations of the data), half the width of a point."""
COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189))


def markdown(report: Mapping[str, Any]) -> str:
    """Few-step recipes at 1, 2 and 4 steps, then those of guidance alone beside the guided teacher, per evaluation.

    A row: distance, modes covered and error of their weights at each count, and cost.
    """
    few = [row for row in report["rows"] if row["family"] != "guidance"]
    guided = [row for row in report["rows"] if row["family"] == "guidance"]
    lines = _table(report, few, STEPS, "step", lambda w: 1) if few else []
    if guided:
        lines += [
            "",
            "Guidance distilled alone: a step costs the guided teacher two network evaluations, a student one.",
            "",
        ]
        lines += _table(report, guided, EVALUATIONS, "evaluation", per_step)
    if pleased := [row for row in report["rows"] if "reward" in row]:
        lines += ["", *_rewards(pleased)]
    run = report["run"]
    notes = [
        "",
        "A cell: sliced Wasserstein distance (modes covered, error of their weights); `worse` where the teacher's own "
        "ODE at as many evaluations is nearer. `near at`: counts within 1.2 of the teacher's 100-step distance.",
        *(f"Not on the plane: {name} ({why})." for name, why in report["left_out"].items()),
        "",
        f"{run['trained']} trained in {run['minutes']:g} minutes, {run['jobs']} at a time; {run['kept']} kept from "
        "runs before.",
        "",
    ]
    return "\n".join([*lines, *notes])


def _table(
    report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], counts: Sequence[int], unit: str,
    cost: Callable[[float], int],
) -> list[str]:  # fmt: skip
    """Lines of one table, the teachers of its rows first. cost: a teacher's of one step, in the columns' unit."""
    names = [str(n) for n in counts]
    head = ["recipe", "family", "w", *(f"{n} {unit}{'s' * (n != '1')}" for n in names), "near at", "seconds"]
    head += ["student evaluations", "teacher evaluations"]
    lines = [_line(head), _line(["---"] * len(head))]
    rest = [""] * (len(head) - 4)
    for w in sorted({row["guidance"] for row in rows}):
        steps = report["teacher"][f"{w:g}"]["steps"]
        cells = [_cell(steps.get(str(n // cost(w)))) for n in counts]
        lines.append(_line(["teacher's ODE", "", f"{w:g}", *cells, *[""] * 4]))
        lines.append(_line(["teacher's ODE, 100 steps", "", f"{w:g}", _cell(steps["100"]), *rest]))
        lines.append(_line(["another draw of the aim", "", f"{w:g}", _cell(steps["reference"]), *rest]))
    for row in rows:
        cells = [_cell(row["steps"].get(n), row["against"].get(n)) for n in names]
        near = " ".join(n for n in names if row["against"].get(n, {}).get("near"))
        spent = [f"{row['seconds']:g}", _millions(row["student_evaluations"]), _millions(row["teacher_evaluations"])]
        lines.append(_line([row["recipe"], row["family"], f"{row['guidance']:g}", *cells, near, *spent]))
    return lines


def _rewards(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What tuning to a reward gained and what it cost: lines of a table."""
    names = [str(n) for n in STEPS]
    lines = [
        "Mean reward, 1 at the heaviest mode of a point's class and 0 far away, with the distance in brackets: of the "
        "student that was tuned, and of what it became.",
        "",
        _line(["recipe", "of the aim", *(f"{n} step{'s' * (n != '1')}" for n in names)]),
        _line(["---"] * (2 + len(names))),
    ]
    for row in rows:
        found = row["reward"]
        cells = [_arrow(found["before"].get(n), found["after"].get(n)) for n in names]
        lines.append(_line([row["recipe"], f"{found['aim']:.3f}", *cells]))
    return lines


def _arrow(before: Mapping[str, float] | None, after: Mapping[str, float] | None) -> str:
    told = [f"{cell['reward']:.3f} ({cell['swd']:.3f})" for cell in (before, after) if cell is not None]
    return " -> ".join(told)


def draw_samples(report: Mapping[str, Any], path: Path) -> None:
    """One row of panels per recipe, one column per step count; the teacher's ODE first, at 1, 2 and 4 and at 100."""
    from ..pictures.grids import comparison_sheet

    rows = {}
    for w, teacher in report["teacher"].items():
        rows[f"teacher w={w}"] = [panel(teacher["points"][n]) for n in ("1", "2", "4")]
        rows[f"100 steps w={w}"] = [panel(teacher["points"]["100"]), _empty(), _empty()]
    for row in report["rows"]:
        rows[row["recipe"]] = [panel(row["points"].get(n, ())) for n in ("1", "2", "4")]
    comparison_sheet(rows, ("1 step", "2 steps", "4 steps"), scale=1).save(path)


def panel(points: Sequence[Sequence[float]]) -> NDArray[np.uint8]:
    """A picture [SIDE, SIDE, 3] of points, as many of each class, in order; those outside are left out."""
    picture = _empty()
    if not len(points):
        return picture
    where = np.asarray(points, dtype=np.float64)
    colours = np.asarray(COLOURS, dtype=np.uint8)[np.arange(len(where)) * len(COLOURS) // len(where)]
    finite = np.isfinite(where).all(1)
    spot = np.full(where.shape, -1, dtype=np.int64)
    spot[finite] = np.clip((where[finite] / REACH + 1.0) * 0.5 * SIDE, -1, SIDE).astype(np.int64)
    inside = ((spot >= DOT) & (spot < SIDE - DOT)).all(1)
    for (x, y), colour in zip(spot[inside], colours[inside], strict=True):
        picture[SIDE - 1 - y - DOT : SIDE - y, x : x + 1 + DOT] = colour
    return picture


def _empty() -> NDArray[np.uint8]:
    return np.full((SIDE, SIDE, 3), 250, dtype=np.uint8)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(scores: Mapping[str, float] | None, against: Mapping[str, Any] | None = None) -> str:
    if scores is None:
        return ""
    mark = " worse" if against is not None and not against["better"] else ""
    return f"{scores['swd']:.3f} ({scores['coverage']:.0%}, {scores['weight_error']:.3f}){mark}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"
