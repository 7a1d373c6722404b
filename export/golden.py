"""Golden cases: requests whose latents after every step the bundle carries, made once by torch in float32.

A case is a safetensors file: `latent` [C, h, w] and `latents` [steps, C, h, w] as the denoiser sees them, `picture`
[H, W, 3] uint8, and `edge` [H, W, 3] uint8 where a ControlNet steers it. Beside the cases lies the map for previews,
fitted to their latents (`fewstep.runtime.sampling.preview`).
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.models.bundle import Bundle, reseal
from fewstep.models.errors import BundleError
from fewstep.models.files import PARTIAL
from fewstep.models.schedulers import MOST_GRIDS
from fewstep.models.spec import GoldenCase, SamplerSpec
from fewstep.runtime.engine import Engine
from fewstep.runtime.engines.torch_engine import TorchEngine
from fewstep.runtime.sampling import preview
from fewstep.runtime.sampling.events import Picture
from fewstep.runtime.sampling.loop import run_request
from fewstep.runtime.sampling.request import Control, GenerateRequest

PROMPTS = ("a red circle", "a blue square", "a green star")
SEED = 20
TEACHER_STEPS = (4, 25)


@dataclass(frozen=True)
class Trace:
    """What one engine made of a case: the latent after each step [C, h, w], and the picture [H, W, 3]."""

    latents: tuple[Tensor, ...]
    picture: Picture


def make_golden(
    bundle: Bundle, *, prompts: Sequence[str] = PROMPTS, progress: Callable[[str], None] | None = None
) -> Bundle:
    """Replace a bundle's golden cases: one for each step count, and one with edges where it has a ControlNet.

    Errors: `BundleError` where the folder cannot be written.
    """
    cases = [
        GoldenCase(prompt=prompts[k % len(prompts)], seed=SEED + k, steps=steps, file=f"steps-{steps}.safetensors",
                   guidance=bundle.spec.guidance.default)
        for k, steps in enumerate(golden_steps(bundle.spec))
    ]  # fmt: skip
    if bundle.has("controlnet"):
        name = f"steps-{cases[-1].steps}-control.safetensors"
        cases.append(replace(cases[-1], file=name, control=name))
    engine = TorchEngine(bundle)
    files: dict[str, dict[str, Tensor]] = {}
    for case in cases:
        if progress is not None:
            progress(case.file)
        width, height = bundle.spec.sizes[0]
        edge = None if case.control is None else edge_picture(width, height)
        trace = run_case(engine, bundle, case, edge)
        tensors = {"latents": torch.stack(trace.latents), "latent": trace.latents[-1].clone()}
        tensors["picture"] = torch.from_numpy(trace.picture)
        files[case.file] = tensors if edge is None else {**tensors, "edge": torch.from_numpy(edge)}
    files[preview.FILE] = {preview.KEY: preview.preview_of_decoder(engine, [t["latent"] for t in files.values()])}
    try:
        _replace_folder(bundle.root, files)
    except OSError as error:
        raise BundleError(
            f"{bundle.root}/golden cannot be written ({error}); use a copy of the bundle you own"
        ) from error
    return reseal(bundle, golden=tuple(cases))


def golden_steps(spec: SamplerSpec) -> tuple[int, ...]:
    """The step counts with a case: every one of a student, and for a teacher, whose counts are many, a short and a long
    run."""
    counts = spec.steps if spec.spacing is None else tuple(range(1, spec.spacing.max_steps + 1))
    if len(counts) <= MOST_GRIDS:
        return counts
    return tuple(n for n in TEACHER_STEPS if n in counts) or (counts[0], counts[-1])


def run_case(engine: Engine, bundle: Bundle, case: GoldenCase, edge: Any = None) -> Trace:
    """A case by the dull loop on any engine.

    Errors: `EngineFailed`; `InvalidRequest` where the spec no longer allows the case.
    """
    latents: list[Tensor] = []

    def watch(picture: int, k: int, x: Tensor) -> None:
        if k > 0:
            latents.append(x.detach().float().cpu().clone())

    control = None if edge is None else Control(edge=edge, kind=next(iter(bundle.spec.control_kinds), None))
    request = GenerateRequest(
        prompt=case.prompt, seed=case.seed, steps=case.steps, guidance=case.guidance, control=control
    )
    result = run_request(engine, bundle, request, watch=watch)
    return Trace(tuple(latents), result.pictures[0])


def load_case(bundle: Bundle, case: GoldenCase) -> dict[str, Tensor]:
    """The tensors of a case's file.

    Errors: `BundleError` where the file is missing or lacks one of them.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = bundle.root / "golden" / case.file
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BundleError(
            f"{path} cannot be read ({error}); make the golden cases anew with `fewstep export`"
        ) from error
    for name in ("latent", "latents", "picture", *(["edge"] if case.control else [])):
        if name not in tensors:
            raise BundleError(f"{path} has no tensor {name!r}; make the golden cases anew with `fewstep export`")
    return tensors


def edge_picture(width: int, height: int) -> Picture:
    """White outlines on black, [H, W, 3] uint8: a frame in the upper left and a cross in the lower right."""
    edge = np.zeros((height, width, 3), dtype=np.uint8)
    top, bottom, left, right = height // 8, height // 2, width // 8, width // 2
    edge[[top, bottom], left : right + 1] = 255
    edge[top : bottom + 1, [left, right]] = 255
    edge[height * 3 // 4, width // 2 :] = 255
    edge[height // 2 :, width * 3 // 4] = 255
    return edge


def _replace_folder(root: Path, files: dict[str, dict[str, Tensor]]) -> None:
    """Write `golden/` beside its place, in `engines/`, which no seal covers, then move it there."""
    from safetensors.torch import save_file

    beside = root / "engines" / f".golden{PARTIAL}"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        for name, tensors in files.items():
            save_file(tensors, beside / name)
        shutil.rmtree(root / "golden", ignore_errors=True)
        beside.rename(root / "golden")
    finally:
        shutil.rmtree(beside, ignore_errors=True)
