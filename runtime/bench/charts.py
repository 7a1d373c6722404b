"""Plain charts as SVG text, for pages and documents: lines over a few x values, and bars, stacked or not.

Colours of text and grid follow the reader's light or dark scheme; the colours of series are legible on both.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#4c78a8", "#e45756", "#2a9d5c", "#c58a00", "#9467bd", "#1aa3b8", "#d6619b", "#8c6d4f", "#7f7f7f", "#5c6bc0")
WIDTH, LEFT, RIGHT, TOP, BOTTOM, KEY = 640, 64, 14, 34, 44, 18
PLOT = 220
"""Height of the drawing inside its axes, in the SVG's units; KEY is the height of one line of the key."""
_STYLE = (
    "<style>.fs text{font:12px system-ui,sans-serif;fill:#222}.fs .g{stroke:#8886}.fs .t{font-weight:600}"
    "@media(prefers-color-scheme:dark){.fs text{fill:#ddd}}</style>"
)


def lines(title: str, series: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str) -> str:
    """Points (x, y) per name, all above 0, on logarithmic axes; x ticks are the values that occur."""
    points = [point for found in series.values() for point in found]
    columns = sorted({px for px, _ in points})
    low, high = _decades([py for _, py in points])
    span = math.log(columns[-1] / columns[0]) or 1.0

    def at(px: float, py: float) -> tuple[float, float]:
        across = math.log(px / columns[0]) / span
        return LEFT + 20 + across * (WIDTH - LEFT - RIGHT - 40), _height(math.log(py / low) / math.log(high / low))

    body = _grid([(at(columns[0], tick)[1], f"{tick:g}") for tick in _ticks(low, high)])
    body += [_text(at(px, low)[0], TOP + PLOT + 16, f"{px:g}", "middle") for px in columns]
    for number, found in enumerate(series.values()):
        path = [at(*point) for point in sorted(found)]
        drawn = " ".join(f"{px:.1f},{py:.1f}" for px, py in path)
        colour = COLOURS[number % len(COLOURS)]
        body.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="2"/>')
        body += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"/>' for px, py in path]
    return _framed(title, list(series), body, x, y)


def bars(title: str, groups: Mapping[str, Mapping[str, float]], *, y: str, stacked: bool = False) -> str:
    """Per group (named below the axis) a value per series: side by side, or one on the other."""
    names = list(dict.fromkeys(name for values in groups.values() for name in values))
    tops = [sum(v.values()) if stacked else max(v.values(), default=0.0) for v in groups.values()]
    high = _round_up(max([*tops, 1e-12]))
    room = (WIDTH - LEFT - RIGHT) / max(1, len(groups))
    body = _grid([(_height(k / 4), f"{high * k / 4:g}") for k in range(5)])
    for place, (group, values) in enumerate(groups.items()):
        left, total = LEFT + place * room, 0.0
        body.append(_text(left + room / 2, TOP + PLOT + 16, group, "middle"))
        for name, value in values.items():
            number = names.index(name)
            width = 0.7 * room / (1 if stacked else len(names))
            start = left + 0.15 * room + (0 if stacked else number * width)
            base = total if stacked else 0.0
            top, bottom = _height((base + value) / high), _height(base / high)
            total += value
            body.append(
                f'<rect x="{start:.1f}" y="{top:.1f}" width="{width:.1f}" height="{bottom - top:.1f}" '
                f'fill="{COLOURS[number % len(COLOURS)]}"><title>{escape(name)}: {value:.4g}</title></rect>'
            )
    return _framed(title, names, body, "", y)


def _framed(title: str, names: Sequence[str], body: Sequence[str], x: str, y: str) -> str:
    below = TOP + PLOT + BOTTOM
    columns = 4
    height = below + KEY * -(-len(names) // columns)
    key = []
    for number, name in enumerate(names):
        left = LEFT + (number % columns) * (WIDTH - LEFT) / columns
        top = below + KEY * (number // columns)
        key.append(
            f'<rect x="{left:.0f}" y="{top - 9}" width="10" height="10" fill="{COLOURS[number % len(COLOURS)]}"/>'
        )
        key.append(_text(left + 15, top, name))
    parts = [
        f'<svg class="fs" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}">{_STYLE}',
        f'<text class="t" x="{LEFT}" y="18">{escape(title)}</text>',
        *body,
        _text(WIDTH - RIGHT, TOP + PLOT + 32, x, "end"),
        f'<text x="14" y="{TOP + PLOT / 2}" text-anchor="middle" transform="rotate(-90 14 {TOP + PLOT / 2})">'
        f"{escape(y)}</text>",
        *key,
        "</svg>",
    ]
    return "\n".join(parts)


def _grid(ticks: Sequence[tuple[float, str]]) -> list[str]:
    body = []
    for height, label in ticks:
        body.append(f'<line class="g" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>')
        body.append(_text(LEFT - 6, height + 4, label, "end"))
    return body


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _height(share: float) -> float:
    return TOP + PLOT * (1.0 - share)


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """The nearest of 1, 2, 5 times a power of ten below the least and above the largest value, never the same."""
    steps = sorted(mantissa * 10.0**power for power in range(-12, 13) for mantissa in (1, 2, 5))
    low = max(step for step in steps if step <= min(values))
    return low, min(step for step in steps if step >= max(values) and step > low)


def _ticks(low: float, high: float) -> list[float]:
    found = [m * 10.0**power for power in range(-12, 13) for m in (1, 2, 5)]
    return sorted(tick for tick in found if low * 0.999 <= tick <= high * 1.001)


def _round_up(value: float) -> float:
    """The least of 1, 2, 4, 5, 8 times a power of ten that is not below `value`."""
    power = 10.0 ** math.floor(math.log10(value))
    return min(m * power for m in (1, 2, 4, 5, 8, 10) if m * power >= value * 0.9999)
