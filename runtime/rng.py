"""A picture belongs to its seed, not to its batch: every picture draws from a CPU generator of its own.

Draws come in diffusers' order (the start noise, then one draw per stochastic step), so the same seed gives the same
picture as diffusers' pipelines on the same weights.
"""

import torch
from torch import Tensor


class NoiseStream:
    """Standard normal draws of one picture. Shapes are without batch, [C, h, w]."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn((1, *shape), generator=self._generator, dtype=torch.float32)[0]
