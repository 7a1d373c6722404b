"""Edges of pictures: a detector with a gradient, its discrepancy from an asked map, and how well two maps agree.

Shapes: pictures [B, 3, H, W] in [-1, 1]; edge maps [B, 1, H, W] in 0 .. 1, as `scenes.edges` draws them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fewstep.models.denoiser import Condition

CONTRAST = 0.35
"""Length of a step of colour, in [-1, 1] units, that counts as half an edge."""
REACH_PX = 2
"""How far a found line may lie from the asked one."""


def detect(pictures: Tensor) -> Tensor:
    """Where colours change: `g^2 / (g^2 + CONTRAST^2)`, g the length of the colour's slope over two pixels."""
    around = functional.pad(pictures.float(), (1, 1, 1, 1), mode="replicate")
    across = 0.5 * (around[:, :, 1:-1, 2:] - around[:, :, 1:-1, :-2])
    down = 0.5 * (around[:, :, 2:, 1:-1] - around[:, :, :-2, 1:-1])
    square = (across.square() + down.square()).sum(1, keepdim=True)
    return square / (square + CONTRAST**2)


def widened(edges: Tensor) -> Tensor:
    """Lines as soft bands some pixels wide, at most 1, so that near lines overlap and there is a slope towards."""
    line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=edges.device) / 16.0
    wide = functional.conv2d(edges.float(), (line[:, None] * line)[None, None], padding=2)
    return (2.5 * wide).clamp(max=1.0)


@dataclass(frozen=True)
class EdgeLikelihood:
    """`log q(c | x) = -|widened(detect(decode(x))) - widened(c)|^2 / (2 tau^2)` [B], summed over pixels.

    c: `edge` [B, 3, H, W] of the condition, as ControlNets take it.
    """

    decoder: Any
    tau: float = 1.0

    def __call__(self, x: Tensor, cond: Condition) -> Tensor:
        found = widened(detect(self.decoder(x)))
        asked = widened(cond["edge"][:, :1].to(found))
        return -(found - asked).square().flatten(1).sum(1) / (2.0 * self.tau**2)


@dataclass(frozen=True)
class Agreement:
    """precision: share of the found line that is near an asked one; recall: of the asked that is near a found one."""

    precision: float
    recall: float

    @property
    def f1(self) -> float:
        both = self.precision + self.recall
        return 2.0 * self.precision * self.recall / both if both else 0.0


def agreement(pictures: Tensor, asked: Tensor) -> Agreement:
    """Of all pictures together; a line is where the detector, or the asked map, is above one half."""
    found, wanted = detect(pictures) > 0.5, asked[:, :1] > 0.5
    near_wanted, near_found = (_grown(line) for line in (wanted, found))
    return Agreement(_share(found, near_wanted), _share(wanted, near_found))


def _grown(line: Tensor) -> Tensor:
    return functional.max_pool2d(line.float(), 2 * REACH_PX + 1, stride=1, padding=REACH_PX) > 0.5


def _share(line: Tensor, near: Tensor) -> float:
    return float((line & near).sum() / line.sum().clamp(min=1))
