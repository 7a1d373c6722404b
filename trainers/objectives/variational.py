"""Variational noise coupling (Silvestri et al. 2025): which noise goes with which sample is learned.

An encoder says for each sample the mean and deviation of its noise, and the same draw is in x_t and in x_s. It learns
by the consistency loss, through x_t, and is held near N(0, 1), which samplers begin with, by its KL divergence.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fewstep.models.denoiser import Condition, Denoiser
from fewstep.models.paths import Path

from ..errors import RecipeError
from ..parts.laws import MappedPairs, levels
from ..parts.objective import Batch, Cast, Metrics, Turn
from .consistency import Consistency

UNIT = math.log(math.expm1(1.0))
"""softplus(UNIT) = 1: an encoder that answers zeros says N(0, 1)."""


def posterior(encoder: Denoiser, x0: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
    """(mean, deviation) of each sample's noise, shaped as x0; the encoder's raw output has twice x0's channels."""
    t = torch.full((x0.shape[0],), encoder.path.end, dtype=torch.float64, device=x0.device)
    mean, width = encoder.raw(x0, t, cond).chunk(2, dim=1)
    return mean, softplus(width + UNIT)


def divergence(mean: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(0, 1)) [B], summed over a sample's elements."""
    return 0.5 * (mean.square() + std.square() - 1.0 - 2.0 * std.log()).flatten(1).sum(1)


@dataclass(frozen=True, kw_only=True)
class VariationalCoupling:
    """A consistency method with a learned coupling. kl: weight of the divergence at the widest gap, where the method's
    own weight is 1 / (t - s): it is divided by that gap in levels, as the paper's is."""

    base: Consistency
    kl: float

    players = ("student", "encoder")

    def __post_init__(self) -> None:
        if not isinstance(self.base.pairs, MappedPairs) or self.base.coupling is not None:
            raise RecipeError(
                "a learned coupling takes the place of another and weighs its divergence by the gaps of MappedPairs; "
                f"this method has pairs of {type(self.base.pairs).__name__} and the coupling {self.base.coupling}"
            )
        if self.kl < 0.0:
            raise RecipeError(f"kl is {self.kl}; the divergence's weight must not be below 0")

    @property
    def roles(self) -> tuple[str, ...]:
        return (*self.base.roles, "encoder")

    @property
    def two_times(self) -> bool:
        return self.base.two_times

    def loss(self, player: str, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        """Each player's turn has the consistency loss under the encoder's noise; the encoder's the divergence too."""
        with torch.set_grad_enabled(player == "encoder"):
            mean, std = posterior(cast["encoder"], batch.x0, batch.cond)

        def coupled(x0: Tensor, noise: Tensor, cond: Condition, turn: Turn) -> Tensor:
            return mean + std * noise

        loss, metrics = replace(self.base, coupling=coupled).loss("student", cast, batch, turn)
        apart = divergence(mean, std).mean()
        metrics = {**metrics, "kl": float(apart.detach())}
        if player == "student":
            return loss, metrics
        return loss + self.kl * self.per_gap(cast["student"].path, turn) * apart, metrics

    def per_gap(self, path: Path, turn: Turn) -> float:
        """1 / (t - r) in levels, at the noisiest t of the stage that holds now."""
        pairs, high = self.base.pairs, levels(path, 2)[-1:]
        assert isinstance(pairs, MappedPairs)  # checked when built
        return float(1.0 / (high - pairs.below(high, pairs.stage(turn))))
