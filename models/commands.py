"""`fewstep import` and `fewstep folder`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import read_names

if TYPE_CHECKING:
    from .importing import Additions
    from .known import Answers
    from .spec import Guidance


def import_(argv: Sequence[str]) -> int:
    """A diffusers folder becomes a bundle."""
    args = _import_parser().parse_args(argv)
    from tqdm import tqdm

    from .importing import import_checkpoint, merged_answers

    answers = merged_answers(_stated(args), args.known)

    with tqdm(desc="import", unit="part", disable=None) as bar:

        def tell(part: str) -> None:
            bar.set_postfix_str(part)
            bar.update()

        bundle = import_checkpoint(
            args.folder,
            args.out,
            config=args.config,
            answers=answers,
            name=args.name,
            sizes=tuple(args.size),
            additions=_additions(args),
            progress=tell,
        )
    spec = bundle.spec
    counts = ", ".join(map(str, spec.steps)) or f"1 to {spec.spacing.max_steps if spec.spacing else 0}"
    sizes = ", ".join(f"{w}x{h}" for w, h in spec.sizes)
    print(f"{bundle.root}: {bundle.family.name}, {spec.sampler}, {spec.prediction}, steps {counts}, {sizes}")
    print(f"next: fewstep generate {bundle.root} 'a red circle'; fewstep export {bundle.root}")
    return 0


def folder(argv: Sequence[str]) -> int:
    """A diffusers folder of the real classes with random weights."""
    from .shapes import SHAPES, make_folder

    parser = argparse.ArgumentParser(
        prog="fewstep folder",
        description="Write a diffusers folder of the real classes with random weights, to try and to time. "
        f"Shapes: {', '.join(SHAPES)}.",
        epilog="example: fewstep folder sd15-full --out sd15 && fewstep import sd15 --as sd15 --out sd15.bundle",
    )
    parser.add_argument("shape", metavar="NAME")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0, help="of the weights; default: 0")
    args = parser.parse_args(argv)
    root = make_folder(args.shape, args.out, seed=args.seed)
    size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    print(f"{root}: {args.shape}, {size / 1e6:.1f} MB")
    return 0


def _import_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fewstep import",
        description="Make a bundle of a local diffusers folder. What the folder does not state (step counts, guidance, "
        "a student's own times) is asked for by name.",
        epilog="example: fewstep import ./sd-turbo --as sd-turbo --out sd-turbo.bundle",
    )
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="a diffusers pipeline folder, or one .safetensors checkpoint"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the bundle to write")
    parser.add_argument(
        "--config", type=Path, metavar="DIR", help="for a single file: a local diffusers folder of its base"
    )
    parser.add_argument("--name", help="the name it is served under; default: that of --out")
    parser.add_argument("--as", dest="known", metavar="NAME", help="answers of a published checkpoint, say sdxl-turbo")
    parser.add_argument("--steps", type=_steps, default=(), help="step counts it is for, comma-separated, or 1-50")
    parser.add_argument(
        "--guidance",
        type=_guidance,
        metavar="MODE[:DEFAULT[:LOW-HIGH]]",
        help="none, cfg:7.5:1-20 or embedded:8.5:1-14",
    )
    parser.add_argument("--sampler", help="sample with this in place of the folder's scheduler: ddim, lcm, euler, ...")
    parser.add_argument("--prediction", choices=("eps", "v", "x0"), help="in place of the scheduler's prediction_type")
    parser.add_argument("--gamma", type=float, help="stochasticity of the tcd sampler; default: 0.3")
    parser.add_argument(
        "--grid", type=_grid, action="append", default=[], metavar="T,T,...", help="the times of a step count; repeat"
    )
    parser.add_argument(
        "--size",
        type=_size,
        action="append",
        default=[],
        metavar="WxH",
        help="a size to serve; default: the trained one",
    )
    parser.add_argument(
        "--lora", type=_lora, action="append", default=[], metavar="FILE[=WEIGHT]", help="merge a LoRA; repeat"
    )
    parser.add_argument(
        "--row-lora",
        type=_row_lora,
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="keep a LoRA beside the weights, for requests to ask for with a weight; repeat",
    )
    parser.add_argument("--decoder", type=Path, metavar="DIR", help="a tiny autoencoder in place of the folder's own")
    parser.add_argument("--controlnet", type=Path, metavar="DIR", help="put in a ControlNet or ControlNet-Union")
    parser.add_argument(
        "--control-kinds", type=read_names, default=(), metavar="A,B,...", help="the union's control types"
    )
    parser.add_argument("--t2i-adapter", type=Path, metavar="DIR", help="put in a T2I-Adapter")
    parser.add_argument("--ip-adapter", type=Path, metavar="FILE", help="put in an IP-Adapter; with --image-encoder")
    parser.add_argument("--image-encoder", type=Path, metavar="DIR", help="the CLIP image encoder of the IP-Adapter")
    parser.add_argument("--negative", choices=("nag", "nasa"), help="negative prompts by attention, for students")
    return parser


def _additions(args: Any) -> "Additions":
    from .importing import Additions

    return Additions(
        loras=tuple(args.lora),
        row_loras=tuple(args.row_lora),
        decoder=args.decoder,
        controlnet=args.controlnet,
        control_kinds=args.control_kinds,
        t2i_adapter=args.t2i_adapter,
        ip_adapter=args.ip_adapter,
        image_encoder=args.image_encoder,
        negative=args.negative,
    )


def _stated(args: Any) -> "Answers":
    from .known import Answers

    return Answers(
        steps=args.steps,
        guidance=args.guidance,
        sampler=args.sampler,
        grids={len(times): times for times in args.grid},
        prediction=args.prediction,
        gamma=args.gamma,
    )


def _steps(text: str) -> tuple[int, ...]:
    low, dash, high = text.partition("-")
    try:
        found = tuple(range(int(low), int(high) + 1)) if dash else tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of step counts such as 1,2,4 or 1-50")
    return found


def _guidance(text: str) -> "Guidance":
    from .spec import Guidance

    mode, *numbers = text.split(":")
    try:
        if mode == "none" and not numbers:
            return Guidance(mode="none")
        if mode in ("cfg", "embedded") and len(numbers) == 2:
            low, high = (float(part) for part in numbers[1].split("-"))
            return Guidance(mode=mode, default=float(numbers[0]), range=(low, high))
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not none, cfg:DEFAULT:LOW-HIGH or embedded:DEFAULT:LOW-HIGH")


def _row_lora(text: str) -> tuple[str, Path]:
    name, equals, file = text.partition("=")
    if not (name and equals and file):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE, as in ink=ink.safetensors")
    return name, Path(file)


def _lora(text: str) -> tuple[Path, float]:
    path, equals, weight = text.rpartition("=")
    try:
        return (Path(path), float(weight)) if equals else (Path(text), 1.0)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no LoRA file with a weight such as style.safetensors=0.8"
        ) from None


def _grid(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of times such as 999,749,499,249") from None


def _size(text: str) -> tuple[int, int]:
    width, cross, height = text.partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 512x512")
    return int(width), int(height)
