"""`fewstep bench report`: the page of measured performance, written from result files and from nothing else."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InvalidRequest
from .charts import bars, lines
from .latency_page import Table, charts, component_table, end_to_end_table
from .latency_report import left_out

INTRODUCTION = """# Performance

Written by `fewstep bench report docs/performance/*.json --out docs/performance.md` from the result files beside it;
change nothing here by hand. Each section names its command, date and machine. Compare ratios, not milliseconds: they
were measured in turns in one process, and a machine shared with others is slower for all alike.
"""
NO_GPU = """## GPU

Not run: no result of `fewstep bench gpu` is in `docs/performance/`. No figure for a GPU is claimed.
"""


def page(reports: Mapping[str, Mapping[str, Any]]) -> tuple[str, dict[str, str]]:
    """The page as Markdown, and its charts: SVG text by file name. reports: by the name of their file, without suffix.

    Errors: `InvalidRequest` naming the file whose kind is unknown or that lacks a field.
    """
    sections, plots = [INTRODUCTION], {}
    for kind in SECTIONS:
        found = {name: report for name, report in reports.items() if report.get("kind") == kind}
        for name, report in found.items():
            try:
                text, svgs = SECTIONS[kind](report)
            except (KeyError, TypeError, ValueError) as error:
                raise InvalidRequest("results", f"{name}.json cannot be shown ({error!r}); measure again") from error
            images = [f"![{title}](performance/{name}-{title}.svg)" for title in svgs]
            plots.update({f"{name}-{title}.svg": svg for title, svg in svgs.items()})
            sections.append("\n\n".join([text, _origin(report), *images]) + "\n")
        if kind == "gpu" and not found:
            sections.append(NO_GPU)
    if unknown := [name for name, report in reports.items() if report.get("kind") not in SECTIONS]:
        kinds = ", ".join(SECTIONS)
        raise InvalidRequest(
            "results", f"{unknown[0]}.json is of kind {reports[unknown[0]].get('kind')!r}; use {kinds}"
        )
    return "\n".join(sections), plots


def command(argv: Sequence[str]) -> int:
    """`fewstep bench report`."""
    parser = argparse.ArgumentParser(
        prog="fewstep bench report",
        description="Write the page of measured performance from the JSON files of `bench latency`, `bench pictures` "
        "and `bench gpu`. Its charts go into the folder that bears the page's name.",
        epilog="example: fewstep bench report docs/performance/*.json --out docs/performance.md",
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.md")
    args = parser.parse_args(argv)
    found: dict[str, Path] = {}
    for path in sorted(args.results):
        if path.stem in found:
            raise InvalidRequest("results", f"{found[path.stem]} and {path} have one name; rename one")
        found[path.stem] = path
    text, plots = page({name: _read(path) for name, path in found.items()})
    folder = args.out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for name, svg in plots.items():
        (folder / name).write_text(svg + "\n")
    args.out.write_text(text.replace("](performance/", f"]({folder.name}/"))
    print(f"{args.out}: {len(args.results)} results, {len(plots)} charts")
    return 0


def markdown(table: Table) -> str:
    """A table of cells, the first column to the left and the others to the right."""
    heads, rows = table
    marks = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [heads, marks, *rows])


def _latency(report: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    width, height = report["size"]
    parts = [
        f"## Latency of {report['bundle']}",
        f"{width}x{height}, guidance {report['guidance']:g}; {report['measured']}. Peers run diffusers' "
        f"{report['diffusers_pipeline']} in eager float32 unless named otherwise.",
        markdown(end_to_end_table(report)),
    ]
    if "components" in report:
        peak = ", ".join(f"{name} {speed:g} GFLOP/s" for name, speed in report["peak_gflop_per_s"].items())
        parts += [
            f"Each network alone. Matrix peak measured in the same run, on a CPU the faster of torch's and OpenVINO's "
            f"product: {peak}.",
            markdown(component_table(report)),
        ]
    notes = [f"{name}: {note}" for name, found in report["peer_notes"].items() for note in found]
    notes += map(left_out, report["skipped"])
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts), charts(report)


def _pictures(report: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    cases = list(dict.fromkeys((row["picture"], row["side"]) for row in report["rows"]))
    cells: dict[str, dict[tuple[str, int], str]] = {}
    for row in report["rows"]:
        case = row["picture"], row["side"]
        cells.setdefault(row["encoder"], {})[case] = f"{row['p50_ms']:.2f} ms, {row['bytes'] / 1024:.0f} KiB"
    heads = ["encoder", *(f"{kind} {side} px" for kind, side in cases)]
    rows = [[name, *(found[case] for case in cases)] for name, found in cells.items()]
    largest = max(side for _, side in cases)
    groups: dict[str, dict[str, float]] = {}
    for row in report["rows"]:
        if row["side"] == largest:
            groups.setdefault(row["picture"], {})[row["encoder"]] = row["p50_ms"]
    text = "## Encoding pictures\n\nMedian time and size of a finished picture's file. The server encodes in a thread."
    return f"{text}\n\n{markdown((heads, rows))}", {"encoding": bars(f"encoding at {largest} px", groups, y="ms")}


def _gpu(report: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    peak = report["peak"]
    said = ", ".join(f"{name} {speed / 1e12:.3g} TFLOP/s" for name, speed in peak["flop_per_s"].items())
    heads = ["shape", "precision", "steps", "batch", "mode", "p50 ms", "floor ms", "over floor", "img/s", "of peak"]
    rows: list[list[str]] = []
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in report["rows"]:
        key = [row["shape"], row["precision"], str(row["steps"]), str(row["batch"]), row["mode"]]
        figures = [f"{row['p50_ms']:.2f}", f"{row['floor_ms']:.2f}", f"{row['over_floor']:.2f}"]
        rows.append([*key, *figures, f"{row['images_per_s']:.1f}", f"{row['fraction_of_peak']:.0%}"])
        if row["steps"] == 1:
            name = f"{row['shape']} {row['precision']} {row['mode']}"
            curves.setdefault(name, []).append((row["batch"], row["images_per_s"]))
    device = report["machine"].get("gpu", "tried on a CPU")
    text = (
        f"## GPU: {device}\n\nNetworks of these shapes with random weights and a tiny decoder, from embedded text to "
        f"pixels. Floor: operations over the measured matrix peak ({said}) or bytes of the weights over the measured "
        f"bandwidth ({peak['bytes_per_s'] / 1e12:.3g} TB/s), whichever takes longer, network by network."
    )
    gone = [f"- left out: {entry['what']}: {entry['why']}" for entry in report["skipped"]]
    parts = [text, markdown((heads, rows)), *(["\n".join(gone)] if gone else [])]
    plots = (
        {"throughput": lines("one step: pictures per second by batch", curves, x="batch", y="img/s")} if curves else {}
    )
    return "\n\n".join(parts), plots


SECTIONS: dict[str, Callable[[Mapping[str, Any]], tuple[str, dict[str, str]]]] = {
    "latency": _latency,
    "pictures": _pictures,
    "gpu": _gpu,
}
"""Kind of report, in the page's order -> its section and charts."""


def _origin(report: Mapping[str, Any]) -> str:
    machine = report["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, torch {machine['torch']}"
    others = [
        f"{name} {machine[name]}" for name in ("onnxruntime", "openvino", "diffusers", "pillow") if name in machine
    ]
    return f"`{report.get('command', 'by the library')}`; {machine['date']}; {', '.join([where, *others])}."


def _read(path: Path) -> Mapping[str, Any]:
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidRequest("results", f"{path} cannot be read as JSON ({error}); name a result file") from error
    if not isinstance(report, dict):
        raise InvalidRequest("results", f"{path} holds no report; name a result file")
    return report
