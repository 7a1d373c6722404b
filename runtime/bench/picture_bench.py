"""`fewstep bench pictures`: what encoding a finished picture takes, per format, setting and size."""

import argparse
import io
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from fewstep.models.arguments import read_count, read_output

from ..engines.measurement import machine_facts, take_turns, timed
from ..sampling.events import Picture
from ..sampling.images import encode

SIDES = (64, 512, 1024)
KINDS = ("photo", "drawing")
Encoder = Callable[[Picture], bytes]


def bench_pictures(
    *, sides: Sequence[int] = SIDES, repeats: int = 7, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Median milliseconds and bytes per encoder, kind of picture and side in pixels; encoders take turns."""
    rows = []
    for kind in KINDS:
        for side in sides:
            picture = sample_picture(kind, side)
            sizes = {name: len(run(picture)) for name, run in ENCODERS.items()}
            calls = {name: timed(partial(run, picture)) for name, run in ENCODERS.items()}
            for name, seconds in take_turns(calls, repeats, progress or (lambda name: None), warm_up=1).items():
                ms = round(statistics.median(seconds) * 1e3, 3)
                rows.append({"picture": kind, "side": side, "encoder": name, "p50_ms": ms, "bytes": sizes[name]})
    return {"kind": "pictures", "machine": machine_facts(), "rows": rows}


def sample_picture(kind: str, side: int) -> Picture:
    """[side, side, 3]: "photo", noise whose power falls with frequency as photographs' does; "drawing", shapes."""
    down, across = np.mgrid[:side, :side] / side
    picture: Picture
    if kind == "drawing":
        picture = np.repeat((20 + 200 * down)[..., None], 3, axis=2).astype(np.uint8)
        picture[(across - 0.4) ** 2 + (down - 0.5) ** 2 < 0.05] = (220, 30, 40)
        picture[(abs(across - 0.75) < 0.1) & (abs(down - 0.3) < 0.1)] = (30, 60, 220)
        return picture
    draw = np.random.default_rng(0)
    frequency = np.fft.fftfreq(side)
    power = frequency[:, None] ** 2 + frequency[None] ** 2
    power[0, 0] = 1.0
    waves = draw.normal(size=(3, side, side)) + 1j * draw.normal(size=(3, side, side))
    smooth = np.fft.ifft2(waves / power**0.55).real
    smooth = (smooth - smooth.mean()) / smooth.std()
    colour = 0.4 * smooth + smooth.mean(axis=0)
    picture = np.ascontiguousarray((127 + 45 * colour).clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
    return picture


def table(report: Mapping[str, Any]) -> str:
    """Lines for a terminal, with each encoder's time over that of ours at PNG level 1."""
    machine = report["machine"]
    lines = [f"{machine['cpu']}, Pillow {machine['pillow']}", ""]
    lines.append(f"{'picture':<8} {'side':>5} {'encoder':<24} {'p50 ms':>8} {'KiB':>8} {'vs png level 1':>15}")
    base = {(r["picture"], r["side"]): r["p50_ms"] for r in report["rows"] if r["encoder"] == REFERENCE}
    for row in report["rows"]:
        ratio = row["p50_ms"] / base[row["picture"], row["side"]]
        kib = row["bytes"] / 1024
        name = f"{row['picture']:<8} {row['side']:>5} {row['encoder']:<24}"
        lines.append(f"{name} {row['p50_ms']:>8.2f} {kib:>8.1f} {ratio:>14.2f}x")
    return "\n".join(lines)


def command(argv: Sequence[str]) -> int:
    """`fewstep bench pictures`."""
    parser = argparse.ArgumentParser(
        prog="fewstep bench pictures",
        description="What encoding a finished picture takes, per format, setting and size; encoders take turns.",
        epilog="example: fewstep bench pictures --json pictures.json",
    )
    parser.add_argument("--repeats", type=read_count, default=7, help="turns measured; default: 7")
    parser.add_argument("--json", type=read_output, metavar="FILE", help="write the report there")
    args = parser.parse_args(argv)
    from tqdm import tqdm

    total = len(KINDS) * len(SIDES) * len(ENCODERS) * (args.repeats + 1)
    with tqdm(total=total, desc="bench pictures", unit="picture", disable=None) as bar:

        def tell(part: str) -> None:
            bar.set_postfix_str(part)
            bar.update()

        report = bench_pictures(repeats=args.repeats, progress=tell)
    report["command"] = f"fewstep bench pictures --repeats {args.repeats}"
    print(table(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _pillow(format: str, **settings: Any) -> Encoder:
    def run(picture: Picture) -> bytes:
        out = io.BytesIO()
        Image.fromarray(picture).save(out, format, **settings)
        return out.getvalue()

    return run


REFERENCE = "png, level 1"
ENCODERS: dict[str, Encoder] = {
    "png, level 0": lambda picture: encode(picture, "png", level=0),
    REFERENCE: lambda picture: encode(picture, "png", level=1),
    "png, level 6": lambda picture: encode(picture, "png", level=6),
    "jpeg, quality 90": lambda picture: encode(picture, "jpeg", quality=90),
    "webp, quality 90": lambda picture: encode(picture, "webp", quality=90),
    "png by Pillow, level 0": _pillow("png", compress_level=0),
    "png by Pillow, level 1": _pillow("png", compress_level=1),
    "webp by Pillow, lossless": _pillow("webp", lossless=True, method=0, quality=0),
}
"""Ours, as `fewstep.runtime.sampling.images` does it, and other ways for comparison."""
