"""`fewstep finetune`: a few-step student learns a user's pictures, keeps its steps, and is held against both.

Two ways, both after a LoRA of the teacher has learned the pictures. "carried": that LoRA is put into the student as it
is; this costs the student no training, and few-step students stay near enough to their teachers for it to fit.
"distilled": the student learns from that teacher again (the recipe `finetune-student`), for students that it does not
fit. The teacher that learned the pictures stays: `OUT-teacher`, or `OUT.run/teacher`.
"""

import argparse
import json
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fewstep.models.arguments import read_count, read_counts, read_output
from fewstep.models.bundle import Bundle, load_bundle, seal_bundle

from ..errors import RecipeError
from ..networks.student import Student, build_student, is_unet, load_denoiser, merged, save_lora
from ..pictures import scenes
from ..recipes.recipe import configure, parse_setting
from ..recipes.registry import RECIPES, find_recipe
from .distill import distill
from .finetune_gate import Limits, judge, report_rows, shown, table
from .folders import check_out, run_folder

LORA = "pytorch_lora_weights.safetensors"


def settings_of(student: Bundle, pictures: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """What `finetune-student` is told of this student: by which recipe it was made, where it and the pictures are.

    Errors: `RecipeError` for a student whose recipe is not known.
    """
    base = changes.get("base", student.spec.recipe)
    if base not in RECIPES:
        raise RecipeError(
            f"{student.name!r} was made by {base!r}, which is no recipe here; name one of students sampled alike "
            "with --set base=RECIPE, lcm or dmd2 for example"
        )
    told: dict[str, Any] = {"base": base, "init": str(student.root), "data": str(pictures)}
    if is_unet(student) and (width := student.config("unet").get("time_cond_proj_dim")) is not None:
        told["guidance_width"] = width
    if student.spec.guidance.mode == "embedded":
        told["guidance_low"], told["guidance_high"] = student.spec.guidance.range
        told["guidance_default"] = student.spec.guidance.default
    return told | changes


def by_carrying(
    student: Bundle, pictures: Path, teacher: Bundle, out: Path, changes: dict[str, Any] | None = None, *,
    resume: bool = False, max_seconds: float | None = None, device: str | None = None,
) -> tuple[Bundle, Bundle]:  # fmt: skip
    """As `finetune`, by the teacher's LoRA alone.

    Errors: those of `distill`; `RecipeError` where the student is not of the teacher's shape.
    """
    check_shapes(student, teacher)
    check_out(out, student, teacher)
    recipe = configure(find_recipe("finetune-student"), settings_of(student, pictures, changes or {}))
    tune = recipe.stages[0]
    alone = replace(
        recipe, name="finetune-teacher", stages=(tune,), student=tune.student or recipe.student, sampling=None,
        needs=replace(recipe.needs, student=False), run=replace(recipe.run, init=None),
    )  # fmt: skip
    where = out.with_name(out.name + "-teacher")
    tuned = distill(alone, teacher, where, resume=resume, max_seconds=max_seconds, device=device)
    made = carried(student, teacher, tuned, out)
    shutil.copy(tuned.root / LORA, made.root / LORA)
    return seal_bundle(made.root, made.name, made.spec), tuned


def finetune(
    student: Bundle, pictures: Path, teacher: Bundle, out: Path, changes: dict[str, Any] | None = None, *,
    resume: bool = False, max_seconds: float | None = None, device: str | None = None,
) -> tuple[Bundle, Bundle]:  # fmt: skip
    """(the student, the teacher that learned the pictures too), both written.

    Errors: those of `distill`.
    """
    settings = settings_of(student, pictures, changes or {})
    recipe = configure(find_recipe("finetune-student"), settings)
    made = distill(recipe, teacher, out, resume=resume, max_seconds=max_seconds, device=device)
    run = run_folder(out)
    tune = recipe.stages[0].student or recipe.student
    return made, tuned_teacher(teacher, tune, run / "tune" / "student.safetensors", run / "teacher")


def tuned_teacher(teacher: Bundle, plan: Student, weights: Path, out: Path) -> Bundle:
    """The teacher with the LoRA that its stage learned, merged and beside it."""
    from safetensors.torch import load_model

    network = build_student(teacher, plan, fold_scale=1.0)
    load_model(network, weights)
    bundle = with_denoiser(teacher, merged(network), out)
    save_lora(network, out, teacher.family.folder)
    return seal_bundle(out, bundle.name, bundle.spec)


def with_denoiser(bundle: Bundle, network: Any, out: Path) -> Bundle:
    """A copy of a bundle with another denoiser of the same shape; what was measured of the old one is left out.

    Errors: `RecipeError` where `out` holds something else.
    """
    check_out(out, bundle)
    shutil.rmtree(out, ignore_errors=True)
    left = shutil.ignore_patterns("engines", "golden", "pytorch_lora_weights.safetensors")
    shutil.copytree(bundle.root, out, ignore=left)
    shutil.rmtree(out / bundle.family.folder)
    network.eval().to(device="cpu", memory_format=torch.contiguous_format).half().save_pretrained(
        out / bundle.family.folder
    )
    return seal_bundle(out, out.name, replace(bundle.spec, quality=(), golden=(), tiny_decoder=()))


def carried(student: Bundle, teacher: Bundle, tuned: Bundle, out: Path) -> Bundle:
    """The student plus what the pictures changed in the teacher, layer by layer: a LoRA carried over, no training.

    Errors: `RecipeError` where the two are not of one shape.
    """
    check_shapes(student, teacher)
    network, was, now = (load_denoiser(bundle) for bundle in (student, teacher, tuned))
    mine, first, second = (net.state_dict() for net in (network, was, now))
    network.load_state_dict({n: v + (second[n] - first[n]) if n in first else v for n, v in mine.items()})
    return with_denoiser(student, network, out)


def check_shapes(student: Bundle, teacher: Bundle) -> None:
    """Errors: `RecipeError` where a LoRA of the teacher does not fit the student."""
    mine, theirs = (load_denoiser(bundle).state_dict() for bundle in (student, teacher))
    odd = [name for name, value in theirs.items() if name not in mine or mine[name].shape != value.shape]
    if odd:
        raise RecipeError(
            f"{student.name!r} has no {odd[0]!r} of the shape in {teacher.name!r}, so a LoRA of one does not fit the "
            "other; fine-tune it with --way distilled, or take a student of the teacher's own shape"
        )


def captions_of(count: int, seed: int = 0) -> tuple[scenes.Caption, ...]:
    rng = random.Random(seed)
    return tuple(scenes.sample(rng).caption for _ in range(count))


def command(argv: Sequence[str]) -> int:
    """Exit codes: 0 done, 1 the gate failed, 2 wrong use."""
    args = _parser().parse_args(argv)
    student = load_bundle(args.student)
    teacher = load_bundle(args.teacher or student.spec.teacher or "scenes-teacher")
    changes = dict(parse_setting(text) for text in args.set)
    size = student.spec.sizes[0]
    own = shown(args.pictures, size)
    held_out = None if args.held_out is None else shown(args.held_out, size)
    seconds = None if args.minutes is None else 60.0 * args.minutes
    made, tuned = WAYS[args.way](
        student, args.pictures, teacher, args.out, changes, resume=args.resume, max_seconds=seconds, device=args.device
    )
    print(f"{made.root}: {student.name} tuned on {len(own.texts)} pictures; {LORA} beside it is the LoRA alone")
    if args.prompts == 0:
        return 0
    steps = [n for n in (args.steps or student.spec.steps) if made.spec.allows(n)]
    limits = Limits(style=args.style, kept=args.kept)
    judged = judge(student, teacher, tuned, own, held_out, captions_of(args.prompts), steps)
    rows, passed = report_rows(judged, {made.name: made}, limits)
    print(table(rows, limits))
    if args.json is not None:
        args.json.write_text(json.dumps({"passed": passed, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    if not passed:
        print(
            "the gate failed: see the rows above; --way distilled, more steps or a lower rate may help", file=sys.stderr
        )
    return 0 if passed else 1


WAYS = {"carried": by_carrying, "distilled": finetune}


def _parser() -> argparse.ArgumentParser:
    limits = Limits()
    parser = argparse.ArgumentParser(
        prog="fewstep finetune",
        description="Fine-tune a few-step student on a folder of pictures, keep its steps, and measure both.",
        epilog="example: fewstep finetune scenes-lcm ./pictures --out runs/mine --held-out ./others",
    )
    parser.add_argument("student", help="bundle folder or shipped name of a few-step student")
    parser.add_argument("pictures", type=Path, help="folder with metadata.jsonl, one {file_name, text} a line")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new student; OUT.run keeps the run")
    parser.add_argument("--teacher", help="what it was distilled from (default: what the student says)")
    parser.add_argument("--way", choices=WAYS, default="carried", help="of reaching the student (%(default)s)")
    parser.add_argument("--held-out", type=Path, help="more pictures of that style, to measure on and not to learn")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of finetune-student")
    parser.add_argument("--minutes", type=float, help="stop after this long")
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUT.run")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (the best there is)")
    parser.add_argument("--steps", type=read_counts, help="step counts to judge, as 1,2,4 (default: all that are sold)")
    parser.add_argument(
        "--prompts", type=lambda text: int(text) if text == "0" else read_count(text), default=128,
        help="prompts of the built-in scenes for compliance; 0 leaves the gate out (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--style", type=float, default=limits.style, help="least share of the way (%(default)s)")
    parser.add_argument("--kept", type=float, default=limits.kept, help="least share of compliance (%(default)s)")
    parser.add_argument("--json", type=read_output, metavar="FILE", help="write the figures to this file too")
    return parser
