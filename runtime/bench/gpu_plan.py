"""What `fewstep bench gpu` measures: shapes of networks and their inputs, and cases in order of importance."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .gpu_shapes import SANA_SPRINT, SD_TURBO, SDXL_TURBO, Sana, UNet, UNetShape

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MODES = ("eager", "graph", "compiled")
"""Plain calls; the same kernels replayed as CUDA graphs; compiled by Inductor and replayed as CUDA graphs."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A network and its inputs without batch: latent [C, h, w], ctx [L, D], `added` if any; a decoder's levels."""

    make: Callable[[], nn.Module]
    latent: tuple[int, int, int]
    ctx: tuple[int, int]
    added: tuple[int, ...] | None = None
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)

    @property
    def factor(self) -> int:
        return int(2 ** (len(self.decoder_blocks) - 1))


TINY = UNetShape(channels=(16, 32), depths=(1, 0), middle_depth=1, ctx=24, head=8, groups=8)
SHAPES = {
    "sd-turbo": Shape(make=lambda: UNet(SD_TURBO), latent=(4, 64, 64), ctx=(77, 1024)),
    "sdxl-turbo": Shape(make=lambda: UNet(SDXL_TURBO), latent=(4, 64, 64), ctx=(77, 2048), added=(2816,)),
    "sana-sprint": Shape(
        make=lambda: Sana(SANA_SPRINT),
        latent=(32, 32, 32),
        ctx=(300, 2304),
        added=(),
        decoder_blocks=(3, 3, 3, 3, 3, 1),
    ),
    "tiny": Shape(make=lambda: UNet(TINY), latent=(4, 8, 8), ctx=(7, 24), decoder_blocks=(1, 1)),
}
"""512 px, and 1024 px for SANA-Sprint, whose own decoder of 160 M parameters a tiny one replaces, as the others'."""


@dataclass(frozen=True)
class Case:
    shape: str
    precision: str
    mode: str
    batch: int

    def __str__(self) -> str:
        return f"{self.shape} {self.precision} {self.mode} batch {self.batch}"


PLAN = (
    Case("sd-turbo", "bf16", "compiled", 1),
    Case("sd-turbo", "bf16", "graph", 1),
    Case("sana-sprint", "bf16", "compiled", 1),
    Case("sd-turbo", "bf16", "eager", 1),
    *(Case("sd-turbo", "bf16", "graph", batch) for batch in (32, 8, 2, 4, 16)),
    Case("sana-sprint", "bf16", "graph", 1),
    Case("sdxl-turbo", "bf16", "graph", 1),
    Case("sd-turbo", "bf16", "compiled", 32),
    Case("sdxl-turbo", "bf16", "compiled", 1),
    *(Case(shape, "bf16", "graph", batch) for batch in (8, 32, 4, 16, 2) for shape in ("sana-sprint", "sdxl-turbo")),
    Case("sd-turbo", "fp16", "graph", 1),
    Case("sd-turbo", "bf16", "compiled", 8),
    *(Case(shape, "bf16", "eager", 1) for shape in ("sana-sprint", "sdxl-turbo")),
)
"""The most important first."""
TINY_PLAN = tuple(Case("tiny", "fp32", mode, batch) for mode in ("graph", "eager") for batch in (1, 2))
"""The same code in a second on any machine."""
