"""`fewstep finetune`: a few-step student learns a user's pictures or takes a LoRA, keeps its steps, and is measured.

First there is a teacher that has the style: a LoRA of it learns the pictures, or one that was trained elsewhere is
given; the teacher with it stays as `OUT-teacher`. Then the student is brought after it, by one of two ways. "carried":
what changed in the teacher is put into the student as it is; this costs no training, and few-step students stay near
enough to their teachers for it to fit. "distilled": the student learns from that teacher again (the last stage of the
recipe `finetune-student`), for students that it does not fit. Where a LoRA comes without pictures, what the teacher
with it draws stands for them.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fewstep.models.arguments import read_count, read_counts, read_output
from fewstep.models.bundle import Bundle, load_bundle, reseal, seal_bundle
from fewstep.models.errors import BundleError
from fewstep.models.files import sha256_of
from fewstep.models.lora import merge_loras
from fewstep.models.spec import SamplerSpec

from ..errors import RecipeError
from ..networks.student import is_unet
from ..pictures import quality
from ..recipes.recipe import Recipe, configure, parse_setting
from ..recipes.registry import RECIPES, find_recipe
from .budget import estimated
from .distill import distill
from .finetune_gate import GateRow, Limits, draw_folder, judge, report_rows, shown, table
from .folders import check_out, check_partners, in_place_of, open_run, run_folder

LORA = "pytorch_lora_weights.safetensors"
DRAWN = 64
"""Pictures that stand for a user's where a LoRA comes without any."""
TUNING = ("tune_steps", "tune_lr", "dropped")
"""Settings of the stage in which the teacher learns pictures."""


def settings_of(student: Bundle, pictures: Path | None, changes: dict[str, Any]) -> dict[str, Any]:
    """What `finetune-student` is told of this student: by which recipe it was made, where it and the pictures are.

    pictures: None where they are still to be drawn.

    Errors: `RecipeError` for a student whose recipe is not known.
    """
    base = changes.get("base", student.spec.recipe)
    if base not in RECIPES:
        raise RecipeError(
            f"{student.name!r} was made by {base!r}, which is no recipe here; name one of students sampled alike "
            "with --set base=RECIPE, lcm or dmd2 for example"
        )
    told: dict[str, Any] = {"base": base, "init": str(student.root)}
    if pictures is not None:
        told["data"] = str(pictures)
    if is_unet(student) and (width := student.config("unet").get("time_cond_proj_dim")) is not None:
        told["guidance_width"] = width
    if student.spec.guidance.mode == "embedded":
        told["guidance_low"], told["guidance_high"] = student.spec.guidance.range
        told["guidance_default"] = student.spec.guidance.default
    return told | changes


def by_carrying(
    student: Bundle, pictures: Path | None, teacher: Bundle, out: Path, changes: dict[str, Any] | None = None, *,
    lora: Path | None = None, resume: bool = False, max_seconds: float | None = None, device: str | None = None,
) -> tuple[Bundle, Bundle]:  # fmt: skip
    """As `finetune`, by putting what changed in the teacher into the student as it is.

    Errors: those of `finetune`; `RecipeError` where the student is not of the teacher's shape.
    """
    changes = changes or {}
    check_asked(pictures, lora, sorted(set(changes) - {"data"}))
    check_out(out, student, teacher)
    check_shapes(student, teacher, teacher.family.folder)
    tuned = tuned_teacher(
        student, pictures, teacher, out, changes, lora=lora, resume=resume, max_seconds=max_seconds, device=device
    )
    made = carried(student, teacher, tuned, out)
    shutil.copy(tuned.root / LORA, made.root / LORA)
    return seal_bundle(made.root, made.name, made.spec), tuned


def finetune(
    student: Bundle, pictures: Path | None, teacher: Bundle, out: Path, changes: dict[str, Any] | None = None, *,
    lora: Path | None = None, resume: bool = False, max_seconds: float | None = None, device: str | None = None,
) -> tuple[Bundle, Bundle]:  # fmt: skip
    """(the student, the teacher that has the style), both written. pictures: a folder to learn, or None for a `lora`.

    Errors: those of `distill`; `RecipeError` for both or neither, or a LoRA that the teacher cannot take.
    """
    changes = changes or {}
    check_asked(pictures, lora, [name for name in TUNING if name in changes])
    check_out(out, student, teacher)
    recipe = configure(find_recipe("finetune-student"), settings_of(student, pictures, changes))
    tune, again = recipe.stages
    recipe = replace(recipe, stages=(replace(again, teacher="teacher"),))
    check_partners(recipe, out)
    run = run_folder(out)
    if not resume:  # where this run is cut before it distils, --resume must not find what an older one distilled
        shutil.rmtree(run, ignore_errors=True)
    part = 0.0 if lora is not None else tune.steps / (tune.steps + again.steps)
    first, second = (None if max_seconds is None else max_seconds * each for each in (part, 1.0 - part))
    tuned = tuned_teacher(
        student, pictures, teacher, out, changes, lora=lora, resume=resume, max_seconds=first, device=device
    )
    recipe = replace(recipe, run=replace(recipe.run, data=str(pictures_of(tuned, pictures, changes))))
    began = (run / "config.json").is_file()
    made = distill(recipe, tuned, out, resume=resume and began, max_seconds=second, device=device)
    return reseal(made, teacher=teacher.name), tuned


def check_asked(pictures: Path | None, lora: Path | None, needless: Sequence[str]) -> None:
    """needless: settings that say nothing where the style comes from a LoRA.

    Errors: `RecipeError` where pictures and a LoRA are both given, or neither; for a needless setting.
    """
    if pictures is None and lora is None:
        raise RecipeError(
            "pictures and lora are both left out; name a folder of pictures to learn, or --lora FILE, a LoRA of the "
            "teacher"
        )
    if pictures is not None and lora is not None:
        raise RecipeError(
            f"pictures is {str(pictures)!r} and lora is {str(lora)!r}, and the style comes from one of them; leave one "
            "out (with a LoRA, pictures of its style are given as --held-out to measure on)"
        )
    if lora is not None and needless:
        raise RecipeError(f"{needless[0]} is set, and nothing is trained by it with lora {str(lora)!r}; leave it out")


def tuned_teacher(
    student: Bundle, pictures: Path | None, teacher: Bundle, out: Path, changes: dict[str, Any], *,
    lora: Path | None, resume: bool, max_seconds: float | None, device: str | None,
) -> Bundle:  # fmt: skip
    """The teacher that has the style, at `OUT-teacher`, with the LoRA beside it: it learned the pictures, or is given
    the LoRA.

    Errors: those of `distill`; `RecipeError` for a LoRA that it cannot take.
    """
    where = out.with_name(out.name + "-teacher")
    if lora is not None:
        return with_lora(teacher, lora, where, resume=resume)
    alone = tuning(settings_of(student, pictures, changes))
    return distill(alone, teacher, where, resume=resume, max_seconds=max_seconds, device=device)


def tuning(settings: dict[str, Any]) -> Recipe:
    """The first stage of `finetune-student` alone, where the teacher learns. Errors: those of `configure`."""
    recipe = configure(find_recipe("finetune-student"), settings)
    tune = recipe.stages[0]
    return replace(
        recipe, name="finetune-teacher", stages=(tune,), student=tune.student or recipe.student, sampling=None,
        needs=replace(recipe.needs, student=False), run=replace(recipe.run, init=None, partners=None),
    )  # fmt: skip


def with_lora(teacher: Bundle, lora: Path, out: Path, *, resume: bool = False) -> Bundle:
    """The teacher with a LoRA file merged at weight 1, in the formats that `fewstep import --lora` reads, and that file
    beside it.

    Errors: `RecipeError` naming a file that is not there, is no LoRA, or is for another network; `CheckpointError`
    where the run to resume had another LoRA.
    """
    check_out(out, teacher)
    try:
        with in_place_of(out) as beside:
            _copy(teacher, beside)
            sources = merge_loras(beside, [(lora, 1.0)])
            shutil.copyfile(lora, beside / LORA)
            told = {"name": "lora", "teacher": teacher.weights_digest, "lora": sha256_of(lora)}
            open_run(run_folder(out), told, resume=resume)
            sealed = seal_bundle(beside, out.name, _unmeasured(teacher.spec), sources=sources)
    except BundleError as error:
        raise RecipeError(f"lora is {str(lora)!r}, and the teacher {teacher.name!r} cannot take it: {error}") from error
    return Bundle(out, sealed.name, sealed.spec)


def pictures_of(tuned: Bundle, pictures: Path | None, changes: dict[str, Any]) -> Path:
    """The folder of the style's pictures: the user's, that of the setting `data`, or what the tuned teacher draws of
    captions of the built-in scenes.

    Errors: `InvalidRequest` for a teacher that does not take these captions.
    """
    given = changes.get("data", pictures)
    if given is not None:
        return Path(given)
    texts = [caption.text for caption in quality.draw_prompts(DRAWN, seed=1).captions]  # compliance has those of seed 0
    return draw_folder(tuned, texts, run_folder(tuned.root) / "drawn")


def carried(student: Bundle, teacher: Bundle, tuned: Bundle, out: Path) -> Bundle:
    """The student plus what changed in the teacher, layer by layer: a LoRA carried over, no training.

    Errors: `RecipeError` where the two are not of one shape.
    """
    texts = sorted(path.parent.name for path in teacher.root.glob("text_encoder*/config.json"))
    changed = [teacher.family.folder, *(name for name in texts if _digests(teacher, name) != _digests(tuned, name))]
    networks = {}
    for name in changed:
        check_shapes(student, teacher, name)
        networks[name] = student.load(name)
        mine, was, now = (net.state_dict() for net in (networks[name], teacher.load(name), tuned.load(name)))
        networks[name].load_state_dict({n: v + (now[n] - was[n]) if n in was else v for n, v in mine.items()})
    return with_networks(student, networks, out)


def check_shapes(student: Bundle, teacher: Bundle, component: str) -> None:
    """Errors: `RecipeError` where a LoRA of the teacher's component does not fit the student's."""
    mine, theirs = (bundle.load(component).state_dict() for bundle in (student, teacher))
    odd = [name for name, value in theirs.items() if name not in mine or mine[name].shape != value.shape]
    if odd:
        raise RecipeError(
            f"{student.name!r} has no {odd[0]!r} of the shape in {teacher.name!r}, so a LoRA of one does not fit the "
            "other; fine-tune it with --way distilled, or take a student of the teacher's own shape"
        )


def with_networks(bundle: Bundle, networks: dict[str, Any], out: Path) -> Bundle:
    """A copy of a bundle with other components of the same shapes, by name; what was measured of the old is left out.

    Errors: `RecipeError` where `out` holds something else.
    """
    check_out(out, bundle)
    shutil.rmtree(out, ignore_errors=True)
    _copy(bundle, out)
    for name, network in networks.items():
        shutil.rmtree(out / name)
        network.eval().to(device="cpu", memory_format=torch.contiguous_format).half().save_pretrained(out / name)
    return seal_bundle(out, out.name, _unmeasured(bundle.spec))


def _copy(bundle: Bundle, out: Path) -> None:
    """The bundle's files but those that were made of its weights."""
    shutil.copytree(bundle.root, out, ignore=shutil.ignore_patterns("engines", "golden", LORA), dirs_exist_ok=True)


def _unmeasured(spec: SamplerSpec) -> SamplerSpec:
    return replace(spec, quality=(), golden=(), tiny_decoder=())


def _digests(bundle: Bundle, component: str) -> dict[str, str]:
    """A component's weight files and what they were sealed with."""
    files = json.loads((bundle.root / "bundle.json").read_text())["files"]
    return {n: d for n, d in files.items() if n.startswith(component + "/") and n.endswith(".safetensors")}


def command(argv: Sequence[str]) -> int:
    """Exit codes: 0 done, 1 the gate failed, 2 wrong use."""
    args = _parser().parse_args(argv)
    student = load_bundle(args.student)
    teacher = load_bundle(args.teacher or student.spec.teacher or "scenes-teacher")
    changes = dict(parse_setting(text) for text in args.set)
    size = student.spec.sizes[0]
    given = changes.get("data", args.pictures)
    prompts = None
    if args.prompts:  # what the gate cannot read is told of before anything is trained
        prompts = quality.draw_prompts(args.prompts)
        held_out = None if args.held_out is None else shown(args.held_out, size)
        own = None if given is None else shown(Path(given), size)
    if args.pictures is not None and args.lora is None and not args.resume:
        print(estimated(tuning(settings_of(student, args.pictures, changes)), teacher), file=sys.stderr)
    seconds = None if args.minutes is None else 60.0 * args.minutes
    made, tuned = WAYS[args.way](
        student, args.pictures, teacher, args.out, changes, lora=args.lora, resume=args.resume, max_seconds=seconds,
        device=args.device,
    )  # fmt: skip
    print(f"{made.root}: {student.name} with the style of {given or args.lora}; {LORA} beside it is the LoRA alone")
    if prompts is None:
        return 0
    folder = pictures_of(tuned, args.pictures, changes)
    drawn = "" if given is not None else f", which {tuned.name} drew"
    print(f"the gate's target is {folder}{drawn}")
    steps = [n for n in (args.steps or student.spec.steps) if made.spec.allows(n)]
    limits = Limits(style=args.style, kept=args.kept, diversity=args.diversity)
    judged = judge(student, teacher, tuned, own or shown(folder, size), held_out, prompts, steps)
    rows, passed = report_rows(judged, {made.name: made}, limits)
    report = {"passed": passed, "target": str(folder), "drawn": given is None, "rows": [asdict(row) for row in rows]}
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return _verdict(rows, limits, passed)


def _verdict(rows: Sequence[GateRow], limits: Limits, passed: bool) -> int:
    """Print the table, and what failed; the exit code."""
    print(table(rows, limits))
    for row in rows:
        for measure, said in row.failures(limits).items():
            print(f"the gate failed: {row.model} in {row.steps} steps, {measure}: {said}", file=sys.stderr)
    if not passed:
        print("--way distilled, more steps or a lower rate may help", file=sys.stderr)
    return 0 if passed else 1


WAYS = {"carried": by_carrying, "distilled": finetune}


def _parser() -> argparse.ArgumentParser:
    limits = Limits()
    parser = argparse.ArgumentParser(
        prog="fewstep finetune",
        description="Fine-tune a few-step student on a folder of pictures, or give it a LoRA of its teacher; keep its "
        "steps, and measure what it reached and kept.",
        epilog="example: fewstep finetune scenes-lcm ./pictures --out runs/mine --held-out ./others",
    )
    parser.add_argument("student", help="bundle folder or shipped name of a few-step student")
    parser.add_argument(
        "pictures", type=Path, nargs="?", help="folder with metadata.jsonl, one {file_name, text} a line; or --lora"
    )
    parser.add_argument("--lora", type=Path, metavar="FILE", help="a LoRA of the teacher, in place of pictures")
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
        help="prompts of the built-in scenes for compliance and diversity; 0 leaves the gate out (%(default)s)",
    )  # fmt: skip
    for name, of in (("style", "the way"), ("kept", "compliance"), ("diversity", "diversity of seeds")):
        parser.add_argument(
            f"--{name}", type=float, default=getattr(limits, name), help=f"least share of {of} (%(default)s)"
        )
    parser.add_argument("--json", type=read_output, metavar="FILE", help="write the figures to this file too")
    return parser
