"""`fewstep demo`: the whole loop on the built-in family, with its tables and pictures.

The demo goes through the same commands a user would type, found by the dispatcher, so no room is imported upward.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewstep.models.errors import FewstepError
from fewstep.runtime.cli import main as fewstep

TEACHER = "scenes-teacher"


@dataclass
class Demo:
    """Where things go, and how each step ended."""

    out: Path
    minutes: float
    prompts: int
    ended: list[tuple[str, float, str]] = field(default_factory=list)

    @property
    def student(self) -> Path:
        return self.out / "student"

    def step(self, title: str, run: Callable[[], int]) -> None:
        """Run one step; a step that cannot run says why, and the demo goes on with what is left."""
        print(f"\n== {title}", flush=True)
        begun = time.monotonic()
        try:
            code = run()
            reason = "" if code == 0 else f"exit code {code}"
        except FewstepError as error:
            reason = str(error)
        if reason:
            print(f"this step could not finish: {reason}", flush=True)
        self.ended.append((title, time.monotonic() - begun, reason))

    def call(self, *words: Any) -> Callable[[], int]:
        line = [str(word) for word in words]

        def run() -> int:
            print("$ fewstep " + " ".join(f'"{w}"' if " " in w else w for w in line), flush=True)
            return fewstep(line)

        return run


def command(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fewstep demo",
        description="Teacher, distil, export, verify, bench, serve: the whole loop on the built-in family.",
        epilog="example: fewstep demo --once",
    )
    parser.add_argument("--once", action="store_true", help="end after the tables instead of serving the page")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder of everything made (%(default)s)")
    parser.add_argument("--minutes", type=float, default=2.0, help="time to distil for (%(default)s)")
    parser.add_argument("--prompts", type=int, default=96, help="prompts of the quality table (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port of the page (%(default)s)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    demo = Demo(args.out, args.minutes, args.prompts)
    run(demo)
    print("\n== summary")
    for title, seconds, reason in demo.ended:
        print(f"{seconds:7.1f} s  {title}{': ' + reason if reason else ''}")
    failed = [title for title, _, reason in demo.ended if reason]
    if not args.once and demo.student.is_dir():
        return fewstep(["serve", str(demo.student), TEACHER, "--port", str(args.port)])
    return 1 if failed else 0


def run(demo: Demo) -> None:
    """Every step in order."""
    student, out = demo.student, demo.out
    demo.step("the teacher at 25 and at 4 steps", lambda: _draw(out / "teacher.png", {TEACHER: (25, 4)}))
    demo.step(
        f"distil a 4-step student for {demo.minutes:g} minutes",
        demo.call("distill", "lcm", "--teacher", TEACHER, "--out", student, "--minutes", demo.minutes,
                  "--set", "scenes=4096"),
    )  # fmt: skip
    demo.step("export to ONNX, proven equal", demo.call("export", student, "--engine", "onnx"))
    demo.step("verify every engine on the golden cases", demo.call("verify", student))
    demo.step(
        "latency per step count, beside diffusers",
        demo.call("bench", "latency", student, "--steps", "1,2,4", "--repeats", 10,
                  "--json", out / "latency.json", "--plot", out / "latency.png"),
    )  # fmt: skip
    demo.step(
        "quality before: the teacher",
        demo.call("bench", "quality", TEACHER, "--steps", "4,25", "--prompts", demo.prompts,
                  "--json", out / "quality_before.json"),
    )  # fmt: skip
    demo.step(
        "quality after: the student",
        demo.call("bench", "quality", student, "--steps", "1,2,4", "--prompts", demo.prompts,
                  "--json", out / "quality_after.json"),
    )  # fmt: skip
    demo.step("the pictures", lambda: _draw(out / "pictures.png", {TEACHER: (25, 4), str(student): (4, 2, 1)}))


def _draw(path: Path, rows: dict[str, tuple[int, ...]]) -> int:
    """A contact sheet, one row per model and step count, the same prompts and seeds in each."""
    from .pictures import draw_rows

    draw_rows(path, rows)
    print(f"wrote {path}")
    return 0
