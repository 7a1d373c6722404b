"""The plane's own reward: how near a point is to the heaviest mode of its class."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.models.denoiser import Condition

from ..errors import RecipeError
from ..networks.rewards import BUILT_IN
from .plane import CLASSES, Plane


@dataclass(frozen=True)
class NearMode:
    """The plane's: `exp(-|x - m_c|^2 / 2)`, m_c the heaviest mode of the row's class. 1 at that mode, 0 far away.

    Whoever maximises it puts every point there and leaves all other modes, which the coverage then shows.
    """

    modes: Tensor

    def __call__(self, x: Tensor, cond: Condition) -> Tensor:
        wanted = cond["label"].to(x) @ self.modes.to(x)
        return torch.exp(-0.5 * (x - wanted).square().sum(1))


def plane_reward(name: str, data: Plane) -> NearMode:
    """The plane's own reward, whichever built-in one is named. Errors: `RecipeError` for a model of pictures."""
    if name not in BUILT_IN:
        raise RecipeError(f"reward is {name!r}, a model that judges pictures, and the plane has none; leave it out")
    heaviest = [torch.where(data.owner == c, data.data.weights, 0.0).argmax() for c in range(CLASSES)]
    return NearMode(data.data.means[torch.stack(heaviest)])
