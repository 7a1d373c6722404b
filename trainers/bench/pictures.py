"""`fewstep pictures`: models and step counts side by side on the same prompts and seeds, as one contact sheet."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from fewstep.models.bundle import load_bundle
from fewstep.models.errors import FewstepError

from ..pictures.grids import comparison_sheet
from ..pictures.quality import sample_pictures

PROMPTS = (
    "a large red circle on a gray background",
    "a small blue star above a large yellow square",
    "two green rings side by side on pink",
    "a purple triangle left of an orange cross",
    "three small white squares in a row on sky",
    "a large black star on a mint background",
    "a yellow circle, a red square and a blue triangle in a row from left to right",
    "a white ring below a purple circle on tan",
)


def draw_rows(path: Path, rows: Mapping[str, Sequence[int]], prompts: Sequence[str] = PROMPTS, seed: int = 7) -> None:
    """Write a sheet with one row per bundle and step count; picture k has seed `seed + k`.

    Errors: `BundleError`, `InvalidRequest` where a bundle does not allow a step count.
    """
    drawn = {}
    seeds = [seed + k for k in range(len(prompts))]
    for where, counts in rows.items():
        bundle = load_bundle(where)
        for steps in counts:
            label = f"{bundle.name}\n{steps} step{'s' if steps > 1 else ''}"
            drawn[label] = list(sample_pictures(bundle, prompts, seeds, steps))
    path.parent.mkdir(parents=True, exist_ok=True)
    comparison_sheet(drawn, prompts).save(path)


def command(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fewstep pictures",
        description="Draw models and step counts side by side on the same prompts and seeds.",
        epilog="example: fewstep pictures docs/pictures.png scenes-teacher:25,4 scenes-lcm:4,2,1 scenes-dmd2:1",
    )
    parser.add_argument("out", type=Path, help="the PNG to write")
    parser.add_argument("rows", nargs="+", metavar="DIR:STEPS", help="bundle and its step counts, as scenes-lcm:4,1")
    parser.add_argument("--seed", type=int, default=7, help="seed of the first picture (%(default)s)")
    args = parser.parse_args(argv)
    draw_rows(args.out, dict(_row(text) for text in args.rows), seed=args.seed)
    print(f"wrote {args.out}")
    return 0


def _row(text: str) -> tuple[str, tuple[int, ...]]:
    where, colon, counts = text.rpartition(":")
    try:
        steps = tuple(int(count) for count in counts.split(","))
    except ValueError:
        steps = ()
    if not colon or not steps:
        raise FewstepError(f"{text!r} is not DIR:STEPS; write it as scenes-lcm:4,2,1")
    return where, steps
