"""A picture belongs to its seed, not to its batch: every picture draws from a CPU generator of its own.

Draws come in diffusers' order (the start noise, then one draw per stochastic step), so the same seed gives the same
picture as diffusers' pipelines on the same weights.
"""

import torch
from torch import Tensor


class NoiseStream:
    """Standard normal draws of one picture. Shapes are without batch, [C, h, w]."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._aside: torch.Generator | None = None

    def draw(self, shape: tuple[int, ...], *, aside: bool = False) -> Tensor:
        """The next draw. aside: from a second stream, which leaves the first as it is."""
        generator = self._generator
        if aside:
            if self._aside is None:  # seeds are from 0 up, so this is no other picture's stream
                self._aside = torch.Generator("cpu").manual_seed(-1 - self._seed)
            generator = self._aside
        return torch.randn((1, *shape), generator=generator, dtype=torch.float32)[0]
