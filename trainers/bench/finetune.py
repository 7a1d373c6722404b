"""`fewstep bench finetune`: ways to teach a few-step student a style, on pictures of the built-in family.

Sixteen paper cut-outs (`trainers.pictures.cutouts`) are learned, others of that style are kept to measure on. Ways:
denoising the student itself, as one would tune a teacher; carrying the teacher's LoRA over; `finetune-student`.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fewstep.models.bundle import Bundle
from fewstep.runtime.engines.measurement import machine_facts

from ..pictures.cutouts import write_folder
from ..pictures.quality import draw_prompts
from ..recipes.recipe import configure
from ..recipes.registry import find_recipe
from ..runs.distill import distill
from ..runs.finetune import carried, finetune, settings_of
from ..runs.finetune_gate import Limits, judge, report_rows, shown, table
from .ways import read_ways

PICTURES, HELD_OUT = 16, 48
WAYS = ("denoised", "carried", "finetune-student")


def denoised(student: Bundle, pictures: Path, teacher: Bundle, out: Path, changes: dict[str, Any]) -> Bundle:
    """The student tuned as one tunes a teacher: `|v - v_theta|^2` on the pictures at all times."""
    recipe = configure(find_recipe("finetune-student"), settings_of(student, pictures, changes))
    stage = replace(recipe.stages[0], name="denoise", start="init", student=None)
    return distill(replace(recipe, name="denoised", stages=(stage,)), teacher, out)


def bench(
    student: Bundle, teacher: Bundle, out: Path, ways: Sequence[str], changes: dict[str, Any], prompts: int,
    steps: Sequence[int], limits: Limits,
) -> dict[str, Any]:  # fmt: skip
    """The report: rows of what was before, of the teacher, and of every way.

    Errors: those of `distill`; `InvalidRequest` for too few prompts.
    """
    prompt_set = draw_prompts(prompts)  # before anything is trained
    folder, others = write_folder(out / "pictures", PICTURES, 1), write_folder(out / "held-out", HELD_OUT, 2)
    made, tuned = finetune(student, folder, teacher, out / "finetune-student", changes)
    found = {}
    for way in ways:
        if way == "denoised":
            found[way] = denoised(student, folder, teacher, out / way, changes)
        else:
            found[way] = made if way == "finetune-student" else carried(student, teacher, tuned, out / way)
    size = student.spec.sizes[0]
    judged = judge(student, teacher, tuned, shown(folder, size), shown(others, size), prompt_set, steps)
    rows, _ = report_rows(judged, found, limits)
    last = [row for row in rows if row.model == WAYS[-1]]
    return {
        "student": student.name, "pictures": PICTURES, "held_out": HELD_OUT, "prompts": prompts,
        "machine": machine_facts(), "rows": [asdict(row) for row in rows], "table": table(rows, limits),
        "passed": all(row.passes(limits) for row in last),
    }  # fmt: skip


def command(argv: Sequence[str]) -> int:
    """Exit codes: 0 done, 1 `finetune-student` failed its gate, 2 wrong use."""
    parser = argparse.ArgumentParser(
        prog="fewstep bench finetune",
        description="Ways to fine-tune a few-step student on 16 pictures: the style reached, and what is kept of "
        "compliance and diversity.",
        epilog="example: fewstep bench finetune --out build/finetune --steps 1,2,4",
    )
    steps = (1, 2, 4)
    asked = read_ways(
        argv,
        parser,
        WAYS,
        steps,
        measured="judge",
        prompts="prompts for compliance",
        settings="a setting of finetune-student",
    )
    args = asked.args
    found = bench(asked.student, asked.teacher, args.out, args.ways, asked.changes, args.prompts, args.steps, Limits())
    print(found.pop("table"))
    asked.keep(found)
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
