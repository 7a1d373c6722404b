"""`fewstep bench latency`: prompt to PNG bytes, per engine and step count, beside diffusers' own pipeline.

Fair means here: the same weights, prompt, seed, guidance and size, one process, one thread count, contestants taking
turns (A B C A B C ...), every prompt new so that no text embedding is reused, the same PNG level.
"""

import argparse
import io
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import EngineUnavailable, InvalidRequest

if TYPE_CHECKING:
    from fewstep.models.bundle import Bundle

    from .events import Picture
    from .local import Runtime

STEPS = (1, 2, 4, 8, 25)
STAGES = ("text", "denoiser", "decode", "encode", "overhead")
DIFFUSERS = "diffusers"
PNG_LEVEL = 1
WARM_UP = 2
PAUSE_S = 0.005
"""Between contestants, for the threads of the last one to fall asleep."""


@dataclass(frozen=True)
class Sample:
    """One prompt to PNG bytes: seconds in all and, where known, by stage; the first picture."""

    total_s: float
    stages_s: Mapping[str, float]
    picture: "Picture"


Contestant = Callable[[str, int, int, int], Sample]
"""(prompt, seed, steps, batch) -> sample."""


def bench_latency(
    bundle: "Bundle",
    *,
    engines: Sequence[str],
    steps: Sequence[int] = STEPS,
    repeats: int = 20,
    threads: int | None = None,
    batch: int = 1,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """The report as `--json` writes it. Step counts that the bundle does not allow are left out and named in `skipped`.

    Errors: `EngineUnavailable` where an engine cannot be had; `InvalidRequest` where no step count is left.
    """
    import torch

    allowed = [n for n in steps if bundle.spec.allows(n)]
    if not allowed:
        raise InvalidRequest("steps", f"steps are {list(steps)}; {bundle.name} allows {list(bundle.spec.steps)}")
    if threads is not None:
        torch.set_num_threads(threads)
    with ExitStack() as stack:
        contestants: dict[str, Contestant] = {DIFFUSERS: _pipeline(bundle)}
        for kind in engines:
            contestants[kind] = _runtime(stack.enter_context(_open(bundle, kind, threads)))
        rows, peers = [], []
        for count in allowed:
            samples = _take_turns(contestants, count, batch, repeats, progress or (lambda part: None))
            peer = [s.total_s for s in samples[DIFFUSERS]]
            peers.append({"steps": count, "batch": batch, **_percentiles(peer, batch)})
            rows += [_row(kind, count, batch, samples[kind], samples[DIFFUSERS]) for kind in engines]
    width, height = bundle.spec.sizes[0]
    return {
        "machine": machine_facts(),
        "bundle": bundle.name,
        "weights_digest": bundle.weights_digest,
        "size": [width, height],
        "guidance": bundle.spec.guidance.default,
        "measured": f"prompt to PNG bytes (compress level {PNG_LEVEL}), new prompts, {repeats} interleaved turns",
        "diffusers_pipeline": _pipeline_name(bundle),
        "rows": rows,
        "diffusers": peers,
        "skipped": [{"steps": n, "why": "not allowed by the bundle"} for n in steps if n not in allowed],
    }


def machine_facts() -> dict[str, Any]:
    """What a reader needs to place the figures."""
    import torch

    versions = {}
    for package in ("torch", "diffusers", "onnxruntime", "onnxruntime-gpu", "openvino"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **versions,
    }


def command(argv: Sequence[str]) -> int:
    """`fewstep bench latency`."""
    args = _parser().parse_args(argv)
    from tqdm import tqdm

    from fewstep.models.bundle import load_bundle

    from .latency_report import plot, table

    bundle = load_bundle(args.bundle)
    engines = args.engines or ready_engines(bundle)
    turns = sum(bundle.spec.allows(n) for n in args.steps) * (len(engines) + 1) * (args.repeats + WARM_UP)
    with tqdm(total=turns, desc="bench latency", unit="picture", disable=None) as bar:

        def tell(part: str) -> None:
            bar.set_postfix_str(part)
            bar.update()

        report = bench_latency(
            bundle,
            engines=engines,
            steps=args.steps,
            repeats=args.repeats,
            threads=args.threads,
            batch=args.batch,
            progress=tell,
        )
    print(table(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot is not None:
        plot(report, args.plot)
    return 0


def ready_engines(bundle: "Bundle") -> tuple[str, ...]:
    """torch, and every exported engine that is verified for these weights."""
    from .engines import usable_export
    from .manifest import exported_kinds

    return ("torch", *(kind for kind in exported_kinds(bundle) if usable_export(bundle, kind)))


def _take_turns(
    contestants: Mapping[str, Contestant], steps: int, batch: int, repeats: int, tell: Callable[[str], None]
) -> dict[str, list[Sample]]:
    """Each contestant once per turn, on the same new prompt and seed; the first turns only warm up."""
    samples: dict[str, list[Sample]] = {name: [] for name in contestants}
    for turn in range(WARM_UP + repeats):
        for name, run in contestants.items():
            tell(f"{steps} steps, {name}")
            time.sleep(PAUSE_S)
            sample = run(f"a red circle {steps} {turn}", turn, steps, batch)
            if turn >= WARM_UP:
                samples[name].append(sample)
    return samples


def _open(bundle: "Bundle", kind: str, threads: int | None) -> "Runtime":
    from .config import RuntimeConfig
    from .local import Runtime

    cached = (
        0 if bundle.spec.guidance.mode == "cfg" else 1
    )  # 1 holds just the running prompt; under guidance "" would stay
    return Runtime([bundle], engine=kind, config=RuntimeConfig(threads=threads, text_cache=cached))


def _runtime(runtime: "Runtime") -> Contestant:
    from .images import encode
    from .request import GenerateRequest

    def run(prompt: str, seed: int, steps: int, batch: int) -> Sample:
        begun = time.perf_counter()
        result = runtime.generate(GenerateRequest(prompt=prompt, seed=seed, steps=steps, n=batch))
        made = time.perf_counter()
        for picture in result.pictures:
            encode(picture, "png")
        ended = time.perf_counter()
        spent = result.timings
        stages = {"text": spent.text_s, "denoiser": spent.denoise_s, "decode": spent.decode_s, "encode": ended - made}
        stages["overhead"] = max(0.0, ended - begun - sum(stages.values()))
        return Sample(ended - begun, stages, result.pictures[0])

    return run


def _pipeline(bundle: "Bundle") -> Contestant:
    """diffusers' own pipeline on the bundle's folder, as its `model_index.json` says: eager, float32."""
    import diffusers
    import numpy as np
    import torch

    with _hushed():
        maker = getattr(diffusers, _pipeline_name(bundle))
        pipeline = maker.from_pretrained(bundle.root, local_files_only=True, use_safetensors=True).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    width, height = bundle.spec.sizes[0]
    guidance = bundle.spec.guidance.default

    def run(prompt: str, seed: int, steps: int, batch: int) -> Sample:
        begun = time.perf_counter()
        pictures = pipeline(
            prompt,
            num_inference_steps=steps,
            guidance_scale=guidance,
            width=width,
            height=height,
            num_images_per_prompt=batch,
            generator=[torch.Generator("cpu").manual_seed(seed + i) for i in range(batch)],
        ).images
        for picture in pictures:
            picture.save(io.BytesIO(), "PNG", compress_level=PNG_LEVEL)
        return Sample(time.perf_counter() - begun, {}, np.asarray(pictures[0].convert("RGB")))

    return run


@contextmanager
def _hushed() -> Iterator[None]:
    """Without the remarks of diffusers and transformers on packages and classes that nobody here chose."""
    import diffusers
    import transformers

    settings = [(house.utils.logging, house.utils.logging.get_verbosity()) for house in (diffusers, transformers)]
    for logging, _ in settings:
        logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logging, verbosity in settings:
            logging.set_verbosity(verbosity)


def _pipeline_name(bundle: "Bundle") -> str:
    try:
        return str(json.loads((bundle.root / "model_index.json").read_text())["_class_name"])
    except (OSError, ValueError, KeyError) as error:
        raise EngineUnavailable(
            f"{bundle.root}/model_index.json names no pipeline ({error!r}); diffusers needs it"
        ) from error


def _row(kind: str, steps: int, batch: int, ours: Sequence[Sample], theirs: Sequence[Sample]) -> dict[str, Any]:
    stages = {stage: statistics.fmean(s.stages_s[stage] for s in ours) for stage in STAGES}
    whole = sum(stages.values())
    peer_p50 = statistics.median(s.total_s for s in theirs)
    return {
        "engine": kind,
        "steps": steps,
        "batch": batch,
        **_percentiles([s.total_s for s in ours], batch),
        "share": {stage: round(seconds / whole, 4) for stage, seconds in stages.items()},
        "overhead_ms": round(statistics.median(s.stages_s["overhead"] for s in ours) * 1e3, 3),
        "vs_diffusers": round(peer_p50 / statistics.median(s.total_s for s in ours), 3),
        "max_difference_from_diffusers": max(_difference(a, b) for a, b in zip(ours, theirs, strict=True)),
    }


def _difference(ours: Sample, theirs: Sample) -> int:
    """Largest difference of a pixel of the two pictures, of 255."""
    return int(abs(ours.picture.astype(int) - theirs.picture.astype(int)).max())


def _percentiles(seconds: Sequence[float], batch: int) -> dict[str, float]:
    """Nearest-rank percentiles, and pictures per second at the median."""
    ranked = sorted(seconds)

    def at(percent: int) -> float:
        return round(ranked[max(0, -(-len(ranked) * percent // 100) - 1)] * 1e3, 3)

    median = statistics.median(ranked)
    return {
        "p50_ms": round(median * 1e3, 3),
        "p95_ms": at(95),
        "p99_ms": at(99),
        "images_per_s": round(batch / median, 2),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fewstep bench latency",
        description="Latency from prompt to PNG bytes per engine and step count, beside diffusers' own pipeline on the "
        "same weights in the same process, taking turns.",
        epilog="example: fewstep bench latency scenes-lcm --engines torch,onnx --steps 1,4 --json latency.json",
    )
    parser.add_argument("bundle", metavar="DIR", help="a bundle folder, or a shipped bundle's short name")
    parser.add_argument("--engines", type=_names, help="comma-separated; default: torch and every verified engine")
    parser.add_argument("--steps", type=_counts, default=STEPS, help="comma-separated; default: 1,2,4,8,25")
    parser.add_argument("--repeats", type=_count, default=20, help="turns measured per step count; default: 20")
    parser.add_argument("--threads", type=_count, help="CPU threads of every contestant; default: torch's choice")
    parser.add_argument("--batch", type=_count, default=1, help="pictures per request; default: 1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture of the report there (PNG, SVG, PDF)")
    return parser


def _names(text: str) -> tuple[str, ...]:
    from .engines import KINDS

    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in KINDS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no engine; use {', '.join(KINDS)}")
    return names


def _counts(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_count(part) for part in text.split(",")))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
