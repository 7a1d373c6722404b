"""What a student's networks really meet: the feeds of its own sampling, recorded row by row, for quantisation.

Random tensors are no stand-in: ranges measured on them are wrong for the latents, times and guidance scales that the
student's plans visit, which are a handful of points.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.models.bundle import Bundle
from fewstep.runtime.engine import CONTROLNET, ENCODER, Engine
from fewstep.runtime.engines.recording import RecordingEngine
from fewstep.runtime.engines.torch_engine import TorchEngine
from fewstep.runtime.sampling.loop import run_request
from fewstep.runtime.sampling.request import Control, GenerateRequest
from fewstep.runtime.sampling.text import Prompts

from .golden import edge_picture, golden_steps

PROMPTS = (
    "a red circle", "a large blue square", "two green stars", "a small yellow ring", "a purple cross on gray",
    "three orange triangles", "a white star on tan", "a black square on pink", "a tiny red star", "a big green circle",
    "two blue rings", "a yellow cross on mint",
)  # fmt: skip
"""Used where the caller has no prompts of the bundle's own domain."""
SEED = 500
Rows = tuple[dict[str, Tensor], ...]
"""Feeds of one role, each of a batch of one."""


def student_feeds(
    bundle: Bundle, *, prompts: Sequence[str] = PROMPTS, seed: int = SEED, engine: Engine | None = None
) -> dict[str, Rows]:
    """The feeds of every role that sampling uses: one picture per prompt, in turn at each step count of the bundle.

    Guidance takes turns between the bundle's default and the ends of its range, where it has one; a ControlNet steers
    every second picture. The encoder is fed the pictures. engine: torch where it is left out.

    Errors: `InvalidRequest` where the model cannot read a prompt; `EngineFailed`.
    """
    recorder = RecordingEngine(engine or TorchEngine(bundle))
    counts, spec = golden_steps(bundle.spec), bundle.spec
    scales = list(dict.fromkeys((spec.guidance.default, *spec.guidance.range)))
    steered = CONTROLNET in recorder.capabilities.roles
    edge = edge_picture(*spec.sizes[0])
    kind = next(iter(spec.control_kinds), None)
    read = Prompts(bundle, capacity=1)
    for k, prompt in enumerate(prompts):
        control = Control(edge=edge, kind=kind) if steered and k % 2 else None
        request = GenerateRequest(
            prompt=prompt,
            seed=seed + k,
            steps=counts[k % len(counts)],
            guidance=scales[k // len(counts) % len(scales)],
            control=control,
        )
        with torch.inference_mode():
            run_request(recorder, bundle, request, prompts=read)
    found = {role: tuple(rows) for role, rows in recorder.rows.items()}
    if ENCODER in recorder.capabilities.roles:
        found[ENCODER] = tuple({"picture": picture} for picture in recorder.pictures)
    return found
