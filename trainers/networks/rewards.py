"""Rewards: what a student is tuned to please. A reward judges samples under their condition, and has a gradient.

A `Reward` maps (samples [B, C, ...] as the denoiser sees them, condition) to [B]; more is better. It never trains: the
one that does is its proxy (`trainers.networks.proxy`). A recipe names its reward: one of `PICTURE_REWARDS`, which look
at decoded pictures, `objects`, which holds them against their captions (`trainers.networks.shown`), or the folder of a
CLIP-like preference model (`trainers.networks.preference_model`). The plane has its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.bundle import Bundle
from fewstep.models.denoiser import Condition

from ..errors import RecipeError
from ..parts.objective import Cast, Reward
from ..pictures.data import PROMPT, Latents
from ..pictures.features import load_features
from ..pictures.finder import load_finder
from .preference_model import load_preference, with_prompts
from .shown import ShowsObjects

DEFAULT, OBJECTS = "colourful", "objects"


def colourfulness(pictures: Tensor) -> Tensor:
    """Hasler & Suesstrunk 2003: `sqrt(var_rg + var_yb) + 0.3 sqrt(mean_rg^2 + mean_yb^2)`, opponent colours in 0 .. 1.

    pictures: [B, 3, H, W] in [-1, 1]. About 0.15 for a colourful photograph, 0 for a grey one. [B].
    """
    r, g, b = (0.5 * (pictures.float().clamp(-1.0, 1.0) + 1.0)).flatten(2).unbind(1)
    axes = torch.stack([r - g, 0.5 * (r + g) - b], 1)
    spread, mean = axes.var(2, unbiased=False).sum(1), axes.mean(2).square().sum(1)
    return (spread + 1e-8).sqrt() + 0.3 * (mean + 1e-8).sqrt()


@dataclass(frozen=True)
class Typical:
    """`-|features|^2 / 2`, mean over the shipped network's 64 features, which have mean 0 and variance 1 over scenes.

    It says how usual a picture's contents and its wear (blur, noise) are; real scenes score about -0.5.
    """

    eye: nn.Module

    def __call__(self, pictures: Tensor) -> Tensor:
        return -0.5 * self.eye(pictures.float()).square().mean(1)  # type: ignore[no-any-return]


PICTURE_REWARDS: Mapping[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "colourful": lambda: colourfulness,
    "typical": lambda: Typical(load_features()),
}
"""Built-in rewards by name that look at pictures alone: what makes a function of them, [B, 3, H, W] in [-1, 1]."""
BUILT_IN = (*PICTURE_REWARDS, OBJECTS)


@dataclass(frozen=True)
class Decoded:
    """A reward of pictures, asked of latents: the frozen decoder stands before it, and the gradient passes through."""

    decoder: Any
    judge: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor, cond: Condition) -> Tensor:
        return self.judge(self.decoder(x))


def picture_reward(name: str, teacher: Bundle, device: torch.device | str = "cpu") -> Reward:
    """The reward of this name, through the teacher's decoder. Errors: `RecipeError` for one that is not there."""
    check_reward(name)
    decoder = teacher.decoder().requires_grad_(False).to(device)
    if name == OBJECTS:
        return ShowsObjects(decoder, load_finder().to(device), teacher.tokenizer)
    if name not in PICTURE_REWARDS:
        return load_preference(Path(name), decoder, device)
    judge = PICTURE_REWARDS[name]()
    return Decoded(decoder, Typical(judge.eye.to(device)) if isinstance(judge, Typical) else judge)


def check_reward(name: str) -> str:
    """The name, where it is one. Errors: `RecipeError` listing what there is."""
    if name in BUILT_IN or (Path(name) / "config.json").is_file():
        return name
    raise RecipeError(
        f"reward is {name!r}; it must be one of {', '.join(BUILT_IN)}, or a folder with a CLIPModel's "
        "config.json, weights and tokenizer, as PickScore's"
    )


def with_prompts_for(reward: str | None, data: Latents, teacher: Bundle) -> Latents:
    """The data as a recipe of this reward needs it: with prompts beside its samples, where the reward reads them.

    Errors: `RecipeError` for a name that is not there, or a preference model without a tokenizer.
    """
    if reward is None or check_reward(reward) in PICTURE_REWARDS:
        return data
    if reward == OBJECTS:
        feeds, empty = {**data.feeds, PROMPT: data.ids}, {**data.empty, PROMPT: data.empty["ids"]}
        return replace(data, feeds=feeds, empty=empty)
    return with_prompts(data, teacher, Path(reward))


def reward_of(cast: Cast, name: str) -> Reward:
    """Errors: `TypeError` where the cast has none of that name."""
    if name not in cast.rewards:
        raise TypeError(f"a term asks for the reward {name!r}, and the cast has {sorted(cast.rewards) or 'none'}")
    return cast.rewards[name]
