"""`fewstep generate`: a picture from a prompt, by the dull loop, in this process."""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InvalidRequest

if TYPE_CHECKING:
    from .sampling.events import Result
    from .sampling.request import Control, GenerateRequest

SUFFIXES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


def generate(argv: list[str]) -> int:
    """Exit code 0; errors are raised as `FewstepError`."""
    asked = _parser().parse_args(argv)
    format = SUFFIXES.get(asked.out.suffix.lower())
    if format is None:
        raise InvalidRequest("out", f"out is {asked.out}; its ending must be one of {', '.join(SUFFIXES)}")
    if not asked.out.parent.is_dir():
        raise InvalidRequest("out", f"out is {asked.out}; the folder {asked.out.parent} does not exist: make it first")
    from fewstep.models.bundle import load_bundle

    from .engines.registry import open_engine
    from .sampling.loop import run_request
    from .sampling.request import GenerateRequest

    request = GenerateRequest(
        prompt=asked.prompt,
        negative_prompt=asked.negative,
        steps=asked.steps,
        seed=asked.seed,
        guidance=asked.guidance,
        gamma=asked.gamma,
        n=asked.n,
        control=_control(asked),
    )
    bundle = load_bundle(asked.bundle)
    engine = open_engine(bundle, asked.engine, threads=asked.threads)
    try:
        result = run_request(engine, bundle, request)
    finally:
        engine.close()
    start = time.monotonic()
    files = _write(result, request, bundle.spec.sampler, asked.out, format)
    report = _report(result, engine.name, files, encode_s=time.monotonic() - start)
    print(json.dumps(report, indent=1) if asked.json else _text(report))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fewstep generate",
        description="Make a picture from a prompt.",
        epilog='example: fewstep generate scenes-lcm "a small red circle above a blue square" --steps 4 --out out.png',
    )
    add = parser.add_argument
    add("bundle", metavar="DIR", help="a bundle folder, or the short name of a shipped one")
    add("prompt", help="what the picture should show")
    add("--negative", metavar="TEXT", help="what it should not show (models with classifier-free guidance)")
    add("--steps", type=int, metavar="N", help="denoising steps; the model's own choice if left out")
    add("--seed", type=int, default=0, metavar="S", help="picture i of n has the seed S + i (default 0)")
    add("--guidance", type=float, metavar="W", help="guidance scale, 1 for none; the model's own choice if left out")
    add("--gamma", type=float, metavar="G", help="stochasticity of the 'tcd' sampler, 0 to 1")
    add("--n", type=int, default=1, metavar="N", help="how many pictures (default 1)")
    add("--control", type=Path, metavar="EDGE.png", help="edge picture for the ControlNet, of the picture's size")
    add("--control-scale", type=float, metavar="K", help="strength of the control, 0 to 2 (default 1)")
    add("--control-kind", metavar="KIND", help="what the control picture is, for a ControlNet-Union: canny, depth, ...")
    add(
        "--engine",
        default="auto",
        metavar="KIND",
        help="auto, or a kind of `fewstep engines DIR` (default auto)",
    )
    add("--threads", type=int, metavar="N", help="CPU threads; the library's own choice if left out")
    add(
        "--out",
        type=Path,
        required=True,
        metavar="F.png",
        help="where to write: .png, .jpg or .webp; n > 1 adds -1, -2",
    )
    add("--json", action="store_true", help="report as JSON")
    return parser


def _control(asked: argparse.Namespace) -> "Control | None":
    if asked.control is None:
        for option in ("control_scale", "control_kind"):
            if getattr(asked, option) is not None:
                raise InvalidRequest(option, f"--{option.replace('_', '-')} needs --control EDGE.png")
        return None
    from .sampling.images import decode
    from .sampling.request import Control

    try:
        data = asked.control.read_bytes()
    except OSError as error:
        raise InvalidRequest("control", f"control is {asked.control}; it cannot be read: {error.strerror}") from error
    scale = 1.0 if asked.control_scale is None else asked.control_scale
    return Control(edge=decode(data, field="control"), scale=scale, kind=asked.control_kind)


def _write(result: "Result", request: "GenerateRequest", sampler: str, out: Path, format: str) -> list[Path]:
    """Write the pictures, each with what makes it again."""
    from .sampling.images import encode
    from .sampling.infotext import picture_metadata

    files = []
    for number, (picture, seed) in enumerate(zip(result.pictures, result.seeds, strict=True), start=1):
        path = out if len(result.pictures) == 1 else out.with_stem(f"{out.stem}-{number}")
        path.write_bytes(encode(picture, format, metadata=picture_metadata(result, request, seed, sampler)))
        files.append(path)
    return files


def _report(result: "Result", engine: str, files: list[Path], *, encode_s: float) -> dict[str, Any]:
    return {
        "files": [str(path) for path in files],
        "seeds": list(result.seeds),
        "model": result.model,
        "engine": engine,
        "steps": result.steps,
        "guidance": result.guidance,
        "nfe": result.nfe,
        "notes": list(result.notes),
        "timings": {**asdict(result.timings), "encode_s": encode_s},
    }


def _text(report: dict[str, Any]) -> str:
    spent = report["timings"]
    lines = [f"note: {note}" for note in report["notes"]]
    for path, seed in zip(report["files"], report["seeds"], strict=True):
        lines.append(f"{path}  seed {seed}")
    parts = ", ".join(f"{stage} {1e3 * spent[stage + '_s']:.1f}" for stage in ("text", "denoise", "decode", "encode"))
    total_ms = 1e3 * (spent["total_s"] + spent["encode_s"])
    lines.append(
        f"{report['model']} on {report['engine']}: {report['steps']} steps, guidance {report['guidance']:g}, "
        f"{total_ms:.1f} ms ({parts}); first call of this process, so warm-up is in it"
    )
    return "\n".join(lines)
