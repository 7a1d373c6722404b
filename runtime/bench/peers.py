"""Peers of `fewstep bench latency`: what users run today, on the same weights, prompts, sizes and PNG encoder."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..sampling.images import encode
from .contestants import Contestant, Sample
from .diffusers_pipeline import call_settings, open_pipeline

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
    return Peer(_contestant(bundle, open_pipeline(bundle)))


def diffusers_compiled(bundle: "Bundle", threads: int | None, work: Path) -> Peer:
    """The same pipeline in bfloat16, channels last, denoiser and decoder through `torch.compile` for each batch size.

    The first pictures of a batch size take tens of seconds to a minute: the warm-up of a measurement.
    """
    import torch

    pipeline = open_pipeline(bundle).to(torch.bfloat16)
    denoiser = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    denoiser.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    denoiser.compile(dynamic=False)
    pipeline.vae.decode = torch.compile(pipeline.vae.decode, dynamic=False)
    return Peer(_contestant(bundle, pipeline))


def genai(precision: str) -> Callable[["Bundle", int | None, Path], Peer]:
    """OpenVINO GenAI's pipeline in one precision, "f32" or "bf16"; see `fewstep.runtime.bench.genai`."""

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


def _contestant(bundle: "Bundle", pipeline: Any) -> Contestant:
    import torch

    def run(prompt: str, seed: int, steps: int, batch: int) -> Sample:
        settings = call_settings(bundle, pipeline, steps)
        begun = time.perf_counter()
        pictures = pipeline(
            prompt,
            **settings,
            num_images_per_prompt=batch,
            generator=[torch.Generator("cpu").manual_seed(seed + i) for i in range(batch)],
        ).images
        arrays = [np.asarray(picture.convert("RGB")) for picture in pictures]
        for array in arrays:
            encode(array, "png")
        return Sample(time.perf_counter() - begun, {}, arrays[0])

    return run
