"""A reward's proxy: a small network that judges latents, so no gradient passes through a decoder or a large model.

Shapes: latents [B, C, h, w] and `ctx` [B, L, D], or points [B, 2] and `label` [B, 4]; judgements [B].
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from fewstep.models.denoiser import Condition


class LatentReward(nn.Module):
    """Three convolutions that halve the latent, the mean of what is left, and of the prompt's tokens."""

    def __init__(self, channels: int, told: int, width: int = 64) -> None:
        super().__init__()
        sizes = (channels, width, width, width)
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.body, self.told = nn.Sequential(*layers), nn.Linear(told, width)
        self.head = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, x: Tensor, cond: Condition) -> Tensor:
        seen = self.body(x.float()).flatten(2).mean(2)
        out: Tensor = self.head(torch.cat([seen, self.told(cond["ctx"].float().mean(1))], 1))[:, 0]
        return out
