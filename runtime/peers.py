"""Peers of `fewstep bench latency`: what users run today, on the same weights, prompts, sizes and PNG encoder."""

import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .contestants import Contestant, Sample
from .errors import EngineUnavailable
from .images import encode

if TYPE_CHECKING:
    from fewstep.models.bundle import Bundle

DIFFUSERS = "diffusers"


@dataclass(frozen=True)
class Peer:
    """A peer ready to run, and what a reader must know of how it differs from the bundle."""

    run: Contestant
    notes: tuple[str, ...] = ()


def diffusers_eager(bundle: "Bundle", threads: int | None, work: Path) -> Peer:
    """diffusers' own pipeline on the bundle's folder, as its `model_index.json` says: eager, float32."""
    return Peer(_contestant(bundle, _pipeline(bundle)))


def diffusers_compiled(bundle: "Bundle", threads: int | None, work: Path) -> Peer:
    """The same pipeline in bfloat16, channels last, denoiser and decoder through `torch.compile` for each batch size.

    The first pictures of a batch size take tens of seconds to a minute: the warm-up of a measurement.
    """
    import torch

    pipeline = _pipeline(bundle).to(torch.bfloat16)
    denoiser = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    denoiser.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    denoiser.compile(dynamic=False)
    pipeline.vae.decode = torch.compile(pipeline.vae.decode, dynamic=False)
    return Peer(_contestant(bundle, pipeline))


def genai(precision: str) -> Callable[["Bundle", int | None, Path], Peer]:
    """OpenVINO GenAI's pipeline in one precision, "f32" or "bf16"; see `fewstep.runtime.genai`."""

    def make(bundle: "Bundle", threads: int | None, work: Path) -> Peer:
        from .genai import genai_contestant, genai_notes

        return Peer(genai_contestant(bundle, work / "genai", precision=precision, threads=threads), genai_notes(bundle))

    return make


PEERS: dict[str, Callable[["Bundle", int | None, Path], Peer]] = {
    DIFFUSERS: diffusers_eager,
    "diffusers-compile-bf16": diffusers_compiled,
    "openvino-genai": genai("f32"),
    "openvino-genai-bf16": genai("bf16"),
}
"""name -> what makes it of a bundle, CPU threads (torch's own are set already) and a folder for its files.

Errors: `EngineUnavailable` where a package is missing or the peer cannot run such a bundle.
"""


def pipeline_name(bundle: "Bundle") -> str:
    """The diffusers pipeline that the bundle's folder is.

    Errors: `EngineUnavailable` where its `model_index.json` names none.
    """
    try:
        return str(json.loads((bundle.root / "model_index.json").read_text())["_class_name"])
    except (OSError, ValueError, KeyError) as error:
        raise EngineUnavailable(
            f"{bundle.root}/model_index.json names no pipeline ({error!r}); diffusers needs it"
        ) from error


def _pipeline(bundle: "Bundle") -> Any:
    import diffusers
    import torch

    with _hushed():
        maker = getattr(diffusers, pipeline_name(bundle))
        pipeline = maker.from_pretrained(bundle.root, local_files_only=True, use_safetensors=True).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _contestant(bundle: "Bundle", pipeline: Any) -> Contestant:
    import torch

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
        arrays = [np.asarray(picture.convert("RGB")) for picture in pictures]
        for array in arrays:
            encode(array, "png")
        return Sample(time.perf_counter() - begun, {}, arrays[0])

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
