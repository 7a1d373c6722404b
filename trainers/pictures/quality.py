"""How good a bundle's pictures are at each step count, and `fewstep bench quality` that says so.

Everything is measured on the same prompts: captions drawn as the training's were, one picture each for Frechet distance
and compliance, and for the first of them a few seeds more for diversity. Real scenes of the very same captions stand
for the data. Figures of different `prompts` counts do not compare: a Frechet distance of few pictures is too large
(real scenes themselves get 2.9 with 256 prompts), so the figures of other real scenes stand beside the models'.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fewstep.models.bundle import Bundle, load_bundle, reseal
from fewstep.models.spec import QualityRow
from fewstep.runtime.errors import InvalidRequest
from fewstep.runtime.sampling.plan import compile_plan
from fewstep.runtime.sampling.request import GenerateRequest, resolve

from . import scenes
from .engine_quality import keep_quality

if TYPE_CHECKING:
    from torch import Tensor

    from fewstep.runtime.engine import Engine
    from fewstep.runtime.sampling.served import Served

Pictures = NDArray[np.uint8]

REAL_PER_PROMPT = 4
SEEDS_PER_PROMPT = 4
"""Pictures of one prompt whose differences are its diversity."""
DIVERSITY_PROMPTS = 48
STUDENT_STEPS, TEACHER_STEPS = (1, 2, 4), (4, 25)


@dataclass(frozen=True)
class PromptSet:
    """Captions, features [P * 4, D] of real scenes of them (a caption's four in a row), and the seed of it all."""

    captions: tuple[scenes.Caption, ...]
    real: "Tensor"
    seed: int


@dataclass(frozen=True)
class Figures:
    """Frechet distance, mean fraction of claims met, fraction of flawless pictures, diversity (1.0: as the data's)."""

    frechet: float
    compliance: float
    strict: float
    diversity: float


@dataclass(frozen=True)
class Measured:
    """One step count's quality row, and what the row has no place for; `seconds` is the time of sampling."""

    row: QualityRow
    strict: float
    seconds: float


def sample_pictures(
    bundle: Bundle,
    captions: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance: float | None = None,
    *,
    batch: int = 64,
    engine: "Engine | None" = None,
    progress: bool = False,
) -> Pictures:
    """One picture per caption and seed, [N, H, W, 3] uint8, the same that the runtime makes. engine: torch if None.

    Errors: `InvalidRequest` where the bundle does not allow the steps, guidance or a caption.
    """
    if len(captions) != len(seeds):
        raise ValueError(f"{len(captions)} captions have {len(seeds)} seeds; give each its own")
    from tqdm import tqdm

    from fewstep.runtime.engines.registry import open_engine
    from fewstep.runtime.sampling.served import Served
    from fewstep.runtime.sampling.text import Prompts

    requests = [
        GenerateRequest(prompt=text, seed=seed, steps=steps, guidance=guidance)
        for text, seed in zip(captions, seeds, strict=True)
    ]
    parts: list[Pictures] = []
    bar = tqdm(total=len(requests), desc=f"{bundle.name}, {steps} steps", unit="picture", disable=not progress)
    with bar, closing(open_engine(bundle, "torch")) if engine is None else nullcontext(engine) as opened:
        model = Served(bundle.name, bundle.spec, opened, Prompts(bundle, capacity=4 * batch))
        for start in range(0, len(requests), batch):
            parts.append(_sample_batch(model, requests[start : start + batch]))
            bar.update(len(parts[-1]))
    return np.concatenate(parts)


def _sample_batch(model: "Served", requests: Sequence[GenerateRequest]) -> Pictures:
    """Requests of one picture and one step count each, all at the same step of their plans."""
    from fewstep.runtime.sampling.loop import admit
    from fewstep.runtime.sampling.work import decode_rows, encode_texts, step_rows

    lives = [admit(model, request) for request in requests]
    encode_texts(model, lives)
    rows = [(live, live.canvases[0]) for live in lives]
    for _ in lives[0].plan.rows:
        _raise_first(step_rows(model, rows))
    _raise_first(decode_rows(model, rows))
    return np.stack([canvas.picture for _, canvas in rows if canvas.picture is not None])


def _raise_first(errors: Sequence[Exception | None]) -> None:
    for error in errors:
        if error is not None:
            raise error


def draw_prompts(prompts: int, seed: int = 0) -> PromptSet:
    """The captions of a seed, and what real scenes of them look like to the feature network.

    Errors: `InvalidRequest` where there are too few prompts to say anything.
    """
    if prompts < 8:
        raise InvalidRequest("prompts", f"prompts is {prompts}; a distance between sets needs 8 at the very least")
    from .features import extract, load_features

    rng = random.Random(seed)
    captions = tuple(scenes.sample(rng).caption for _ in range(prompts))
    drawn = [np.asarray(scenes.render(scenes.sample_like(c, rng))) for c in captions for _ in range(REAL_PER_PROMPT)]
    return PromptSet(captions, extract(load_features(), np.stack(drawn)), seed)


def measure(prompt_set: PromptSet, pictures: Pictures, more: Pictures) -> Figures:
    """Hold pictures against the captions of a prompt set and against real scenes of them.

    pictures: [P, H, W, 3], one per caption. more: [Q * 3, H, W, 3], three more seeds of each of the first Q captions.
    """
    from .compliance import check
    from .diversity import diversity
    from .features import extract, load_features
    from .frechet import frechet_distance

    net = load_features()
    features, further = extract(net, pictures), extract(net, more)
    few = len(more) // (SEEDS_PER_PROMPT - 1)
    same_prompt = _by_prompt(features[:few], further)
    real_prompt = prompt_set.real[: few * REAL_PER_PROMPT].reshape(few, REAL_PER_PROMPT, -1)
    verdicts = [check(as_scene(p), c) for p, c in zip(pictures, prompt_set.captions, strict=True)]
    return Figures(
        frechet=frechet_distance(prompt_set.real, features),
        compliance=float(np.mean([v.score for v in verdicts])),
        strict=float(np.mean([v.strict for v in verdicts])),
        diversity=diversity(same_prompt, real_prompt),
    )


def measure_data(prompt_set: PromptSet) -> Figures:
    """The figures of other real scenes of the same captions: what a perfect model would get with so few pictures."""
    rng = random.Random(prompt_set.seed + 1)
    few = prompt_set.captions[:DIVERSITY_PROMPTS]
    again = [caption for caption in few for _ in range(SEEDS_PER_PROMPT - 1)]
    drawn = [np.asarray(scenes.render(scenes.sample_like(c, rng))) for c in (*prompt_set.captions, *again)]
    count = len(prompt_set.captions)
    return measure(prompt_set, np.stack(drawn[:count]), np.stack(drawn[count:]))


def _by_prompt(first: "Tensor", further: "Tensor") -> "Tensor":
    """Features [Q, D] of one seed and [Q * 3, D] of three more as [Q, 4, D]."""
    import torch

    return torch.cat([first[:, None], further.reshape(len(first), SEEDS_PER_PROMPT - 1, -1)], dim=1)


def as_scene(picture: Pictures) -> Pictures:
    """A picture at the size that the attribute reader reads."""
    if picture.shape[:2] == (scenes.SIZE, scenes.SIZE):
        return picture
    from PIL import Image

    small = Image.fromarray(picture).resize((scenes.SIZE, scenes.SIZE), Image.Resampling.BOX)
    return np.asarray(small)


def measure_bundle(
    bundle: Bundle,
    steps: int,
    prompt_set: PromptSet,
    *,
    guidance: float | None = None,
    engine: "Engine | None" = None,
    progress: bool = False,
) -> Measured:
    """Sample a bundle on a prompt set at one step count and measure it."""
    plan = compile_plan(resolve(GenerateRequest(prompt="a", steps=steps, guidance=guidance), bundle.spec), bundle.spec)
    texts = [caption.text for caption in prompt_set.captions]
    few = min(DIVERSITY_PROMPTS, len(texts))
    again = [text for text in texts[:few] for _ in range(SEEDS_PER_PROMPT - 1)]
    seeds = range(prompt_set.seed, prompt_set.seed + len(texts) + len(again))
    begun_s = time.perf_counter()
    made = sample_pictures(bundle, texts + again, seeds, steps, guidance, engine=engine, progress=progress)
    seconds = time.perf_counter() - begun_s
    figures = measure(prompt_set, made[: len(texts)], made[len(texts) :])
    row = QualityRow(
        steps=steps,
        nfe=plan.nfe,
        guidance=plan.rows[0].w,
        frechet=round(figures.frechet, 4),
        compliance=round(figures.compliance, 4),
        diversity=round(figures.diversity, 4),
        pictures=len(texts),
    )
    return Measured(row, round(figures.strict, 4), round(seconds, 2))


def evaluate(
    bundle: Bundle,
    steps: Sequence[int] = STUDENT_STEPS,
    *,
    prompts: int = 256,
    guidance: float | None = None,
    seed: int = 0,
    engine: str = "torch",
    progress: bool = False,
) -> list[QualityRow]:
    """The bundle's quality curve: one row per step count. engine: "torch", or an exported one of the bundle's.

    Errors: `InvalidRequest` for a step count or guidance that the bundle does not allow.
    """
    measured = _measure_steps(bundle, steps, draw_prompts(prompts, seed), guidance, engine, progress)
    return [one.row for one in measured]


def _measure_steps(
    bundle: Bundle, steps: Sequence[int], prompt_set: PromptSet, guidance: float | None, engine: str, progress: bool
) -> list[Measured]:
    from fewstep.runtime.engines.registry import open_engine

    with closing(open_engine(bundle, engine)) as opened:
        return [
            measure_bundle(bundle, count, prompt_set, guidance=guidance, engine=opened, progress=progress)
            for count in steps
        ]


def merge_rows(old: Sequence[QualityRow], new: Sequence[QualityRow]) -> tuple[QualityRow, ...]:
    """A curve with rows measured anew in place of those of the same steps and guidance, by rising steps."""
    rows = {(row.steps, row.guidance): row for row in (*old, *new)}
    return tuple(rows[key] for key in sorted(rows))


def command(argv: list[str]) -> int:
    """`fewstep bench quality`."""
    from tqdm import tqdm

    args = _parser().parse_args(argv)
    bundles = [load_bundle(where) for where in args.bundles]
    plan = [(bundle, _steps_of(bundle, args.steps)) for bundle in bundles]
    prompt_set = draw_prompts(args.prompts, args.seed)
    rows: list[dict[str, Any]] = []
    refused: list[str] = []
    for bundle, counts in plan:
        if skipped := sorted(set(args.steps or ()) - set(counts)):
            tqdm.write(f"{bundle.name}: was not made for {', '.join(map(str, skipped))} steps; left out")
        measured = _measure_steps(bundle, counts, prompt_set, args.guidance, args.engine, progress=not args.quiet)
        rows += [_as_json(bundle, one, args.engine) for one in measured]
        if args.write and args.engine != "torch":
            exact = _measure_steps(bundle, counts, prompt_set, args.guidance, "torch", progress=not args.quiet)
            rows += [_as_json(bundle, one, "torch") for one in exact]
            found, wanted = ([one.row for one in part] for part in (measured, exact))
            refused += [
                f"{bundle.name}: {said}" for said in keep_quality(bundle, args.engine, found, wanted, args.seed)
            ]
        elif args.write:
            reseal(bundle, quality=merge_rows(bundle.spec.quality, [one.row for one in measured]))
    data = {name: round(value, 4) for name, value in asdict(measure_data(prompt_set)).items()}
    report = {"prompts": args.prompts, "seed": args.seed, "data": data, "rows": rows, "refused": refused}
    for said in refused:
        print(f"{args.engine} is refused: {said}; state a wider budget with `fewstep verify`", file=sys.stderr)
    if args.json == "-":
        print(json.dumps(report, indent=1))
        return int(bool(refused))
    print(table([*rows, {"model": "real scenes", "steps": "", "nfe": "", "guidance": "", **data}]))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    return int(bool(refused))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Quality rows as a Markdown table."""
    names = ("model", "steps", "nfe", "guidance", "frechet", "compliance", "strict", "diversity")
    lines = [[str(row[name]) for name in names] for row in rows]
    widths = [max(len(line[k]) for line in [list(names), *lines]) for k in range(len(names))]
    form = "| " + " | ".join(f"{{:<{w}}}" if k == 0 else f"{{:>{w}}}" for k, w in enumerate(widths)) + " |"
    rule = "| " + " | ".join("-" * w if k == 0 else "-" * (w - 1) + ":" for k, w in enumerate(widths)) + " |"
    return "\n".join([form.format(*names), rule, *(form.format(*line) for line in lines)])


def _as_json(bundle: Bundle, one: Measured, engine: str) -> dict[str, Any]:
    extra = {"strict": one.strict, "seconds": one.seconds, "engine": engine, "weights": bundle.weights_digest}
    return {"model": bundle.name, **asdict(one.row), **extra}


def _steps_of(bundle: Bundle, asked: Sequence[int] | None) -> list[int]:
    """The asked step counts that the bundle allows; unasked, those worth knowing of a student or a teacher.

    Errors: `InvalidRequest` where it allows none of them.
    """
    if asked is None:
        usual = TEACHER_STEPS if bundle.spec.spacing is not None else STUDENT_STEPS
        return [count for count in usual if bundle.spec.allows(count)] or list(bundle.spec.steps)
    counts = [count for count in asked if bundle.spec.allows(count)]
    if not counts:
        made_for = (
            ", ".join(map(str, bundle.spec.steps)) or f"1 to {bundle.spec.spacing and bundle.spec.spacing.max_steps}"
        )
        raise InvalidRequest("steps", f"steps is {list(asked)}; {bundle.name} was made for {made_for}")
    return counts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fewstep bench quality",
        description="Frechet distance, prompt compliance and diversity of bundles of the scenes family per step count.",
        epilog="example: fewstep bench quality scenes-teacher scenes-lcm --steps 1,2,4,25 --json quality.json",
    )
    parser.add_argument("bundles", nargs="+", metavar="DIR", help="bundle folder, or a shipped bundle's short name")
    parser.add_argument("--steps", type=step_counts, help="step counts, as 1,2,4 (default: 1,2,4; for teachers 4,25)")
    parser.add_argument("--prompts", type=int, default=256, help="captions, one picture each (default: %(default)s)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the bundle's)")
    parser.add_argument("--seed", type=int, default=0, help="seed of captions and pictures (default: %(default)s)")
    parser.add_argument("--engine", default="torch", help="torch, or an exported engine (default: %(default)s)")
    parser.add_argument("--json", metavar="F", help="write the figures to this file; - prints them")
    parser.add_argument(
        "--write",
        action="store_true",
        help="store the figures: in each bundle as its quality curve, or of an exported engine in its manifest, beside "
        "torch's and held to its budget",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def step_counts(text: str) -> list[int]:
    """`1,2,4` as numbers. Errors: `argparse.ArgumentTypeError`."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of step counts; write it as 1,2,4")
    return list(dict.fromkeys(counts))
