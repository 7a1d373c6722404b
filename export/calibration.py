"""What a student's networks really meet: the feeds of its own sampling, recorded row by row, for quantisation.

Random tensors are no stand-in: ranges measured on them are wrong for the latents, times and guidance scales that the
student's plans visit, which are a handful of points.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fewstep.models.bundle import Bundle
from fewstep.runtime.engine import CONTROLNET, DECODER, ENCODER, Capabilities, Engine
from fewstep.runtime.loop import run_request
from fewstep.runtime.request import Control, GenerateRequest
from fewstep.runtime.text import Prompts
from fewstep.runtime.torch_engine import TorchEngine

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


class RecordingEngine:
    """Passes calls on to an engine and keeps copies of their feeds, split into rows, in `rows[role]`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.rows: dict[str, list[dict[str, Tensor]]] = defaultdict(list)
        self.pictures: list[Tensor] = []

    @property
    def name(self) -> str:
        return self._engine.name

    @property
    def capabilities(self) -> Capabilities:
        return self._engine.capabilities

    def run(self, role: str, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        batch = next(iter(feeds.values())).shape[0]
        self.rows[role] += [{name: value[k : k + 1].clone() for name, value in feeds.items()} for k in range(batch)]
        outputs = self._engine.run(role, feeds)
        if role == DECODER:
            self.pictures += list(torch.split(outputs[0].clone(), 1))
        return outputs

    def close(self) -> None:
        self._engine.close()


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
    if ENCODER in recorder.capabilities.roles:
        recorder.rows[ENCODER] = [{"picture": picture} for picture in recorder.pictures]
    return {role: tuple(rows) for role, rows in recorder.rows.items()}
