"""The report of `fewstep bench latency` as charts, as tables of cells, and as one HTML page of its own."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .charts import bars, lines
from .contestants import STAGES
from .latency_report import contestants, left_out, smallest_batch

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Column heads, rows of cells."""
_STYLE = """
:root{color-scheme:light dark;--ink:#1b1b1b;--paper:#fff;--line:#ccc}
@media(prefers-color-scheme:dark){:root{--ink:#e2e2e2;--paper:#16181b;--line:#444}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:60rem;margin:2rem auto;
padding:0 1rem}
table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}
th,td{padding:.2rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}
figure{margin:1.5rem 0}svg{width:100%;height:auto}code{overflow-wrap:anywhere}
"""


def page(report: Mapping[str, Any]) -> str:
    """One self-contained page, light or dark as the reader's system says: plots, tables, machine, command."""
    figures = "".join(f"<figure>{svg}</figure>" for svg in charts(report).values())
    facts = "".join(f"<tr><td>{escape(k)}</td><td>{escape(str(v))}</td></tr>" for k, v in report["machine"].items())
    notes = [f"{name}: {note}" for name, found in report["peer_notes"].items() for note in found]
    notes += [left_out(gone) for gone in report["skipped"]]
    width, height = report["size"]
    body = [
        f"<h1>Latency of {escape(report['bundle'])}</h1>",
        f"<p>{width}x{height}, guidance {report['guidance']:g}; {escape(report['measured'])}.</p>",
        f"<p><code>{escape(report.get('command', ''))}</code></p>",
        figures,
        "<h2>End to end</h2>",
        _html(end_to_end_table(report)),
        "<h2>Each network alone</h2>" + _html(component_table(report)) if "components" in report else "",
        "".join(f"<p>{escape(note)}</p>" for note in notes),
        f"<h2>Machine</h2><table>{facts}</table>",
    ]
    head = f'<meta charset="utf-8"><title>Latency of {escape(report["bundle"])}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def charts(report: Mapping[str, Any]) -> dict[str, str]:
    """SVG by name: latency per step count, ratio to diffusers, where the time goes, fraction of the peak."""
    rows = smallest_batch(contestants(report))
    curves: dict[str, list[tuple[float, float]]] = {}
    ratios: dict[str, dict[str, float]] = {}
    for row in sorted(rows, key=lambda row: int(row["steps"])):
        curves.setdefault(row["engine"], []).append((row["steps"], row["p50_ms"]))
        ratios.setdefault(_steps(row["steps"]), {})[row["engine"]] = row["vs_diffusers"]
    found = {
        "latency": lines("median latency, prompt to PNG", curves, x="steps", y="ms"),
        "ratio": bars("times as fast as diffusers in eager float32", ratios, y="ratio"),
    }
    least = smallest_batch(report["rows"])
    fewest = min(row["steps"] for row in least)
    shares = {r["engine"]: {s: r["share"][s] * r["p50_ms"] for s in STAGES} for r in least if r["steps"] == fewest}
    found["stages"] = bars(f"where the time goes at {_steps(fewest)}", shares, y="ms", stacked=True)
    if "components" in report:
        of_peak: dict[str, dict[str, float]] = {}
        for row in smallest_batch(report["components"]):
            if row["fraction_of_peak"] is not None:
                of_peak.setdefault(row["role"], {})[row["engine"]] = row["fraction_of_peak"]
        found["peak"] = bars("fraction of the machine's measured matrix peak", of_peak, y="fraction")
    return found


def end_to_end_table(report: Mapping[str, Any]) -> Table:
    others = list(dict.fromkeys(row["engine"] for row in report["peers"]))
    heads = ["engine", "steps", "batch", "p50 ms", "p95 ms", "p99 ms", "img/s", "vs diffusers"]
    heads += [f"vs {name}" for name in others]
    rows = []
    for row in sorted(contestants(report), key=lambda row: (row["steps"], row["batch"])):
        cells = [row["engine"], str(row["steps"]), str(row["batch"])]
        cells += [f"{row[key]:.1f}" for key in ("p50_ms", "p95_ms", "p99_ms", "images_per_s")]
        cells += [f"{row['vs_diffusers']:.2f}", *(_ratio(row, name) for name in others)]
        rows.append(cells)
    return heads, rows


def component_table(report: Mapping[str, Any]) -> Table:
    heads = ["role", "engine", "batch", "p50 ms", "GFLOP", "GFLOP/s", "of peak"]
    rows = []
    for row in report["components"]:
        share = "-" if row["fraction_of_peak"] is None else f"{row['fraction_of_peak']:.0%}"
        cells = [row["role"], row["engine"], str(row["batch"]), f"{row['p50_ms']:.2f}"]
        rows.append([*cells, f"{row['gflop']:.3f}", f"{row['gflop_per_s']:.1f}", share])
    return heads, rows


def _ratio(row: Mapping[str, Any], peer: str) -> str:
    return f"{row['vs'][peer]:.2f}" if "vs" in row else "-"


def _steps(count: int) -> str:
    return f"{count} step{'s' if count > 1 else ''}"


def _html(table: Table) -> str:
    heads, rows = table
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    lines_ = ("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{''.join(lines_)}</table>"
