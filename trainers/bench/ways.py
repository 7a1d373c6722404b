"""What commands that compare ways to change a student are told: the student, the ways, settings, where results go."""

import argparse
import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.models.arguments import read_count, read_counts, read_names, read_output
from fewstep.models.bundle import Bundle, load_bundle

from ..recipes.recipe import parse_setting


@dataclass(frozen=True)
class Asked:
    """changes: the settings given. student: the bundle; teacher: the one that it was distilled from."""

    args: Namespace
    student: Bundle
    teacher: Bundle
    changes: dict[str, Any]

    def keep(self, report: Mapping[str, Any]) -> None:
        """Write the report where one was asked for."""
        if self.args.json is not None:
            self.args.json.write_text(json.dumps(report, indent=1) + "\n")


def read_ways(
    argv: Sequence[str], parser: argparse.ArgumentParser, ways: tuple[str, ...], steps: tuple[int, ...], *,
    measured: str, prompts: str, settings: str,
) -> Asked:  # fmt: skip
    """Errors: exit code 2 for a way that is not known; `BundleError` for a student that cannot be opened."""
    counts = ",".join(map(str, steps))
    parser.add_argument("--student", default="scenes-lcm", help="bundle folder or shipped name (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained students and their runs")
    parser.add_argument("--ways", type=read_names, default=ways, help=f"some of {','.join(ways)} (all)")
    parser.add_argument("--steps", type=read_counts, default=steps, help=f"step counts to {measured} ({counts})")
    parser.add_argument("--prompts", type=read_count, default=256, help=f"{prompts} (%(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=settings)
    parser.add_argument("--json", type=read_output, metavar="FILE", help="write the report to this file too")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.ways) - set(ways)):
        parser.error(f"there is no way {unknown[0]!r}; take some of {', '.join(ways)}")
    student = load_bundle(args.student)
    teacher = load_bundle(student.spec.teacher or "scenes-teacher")
    return Asked(args, student, teacher, dict(parse_setting(text) for text in args.set))
