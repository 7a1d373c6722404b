"""Another objective of one player as a term: trajectory and distribution methods side by side (rCM, SANA-Sprint)."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import RecipeError
from ..parts.objective import Batch, Cast, Metrics, Objective, Turn
from ..parts.rollout import Made
from ..parts.times import UniformScale


@dataclass(frozen=True)
class Also:
    """`weight` times the objective's loss on the batch; what the rollout made is not its business.

    It draws as it would alone, whatever was drawn before: with every other weight at 0 the run is that objective's own,
    bit for bit.

    Errors: `RecipeError` for an objective of several players.
    """

    objective: Any
    weight: float = 1.0

    of_samples = False

    def __post_init__(self) -> None:
        if tuple(self.objective.players) != ("student",):
            raise RecipeError(
                f"{type(self.objective).__name__} has the players {tuple(self.objective.players)}; only an objective "
                "of the student alone can be a term"
            )

    @property
    def roles(self) -> tuple[str, ...]:
        own: Objective = self.objective
        return own.roles

    @property
    def guidance(self) -> UniformScale | None:
        return getattr(self.objective, "guidance", None)

    @property
    def two_times(self) -> bool:
        return bool(getattr(self.objective, "two_times", False))

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        rng = torch.Generator(turn.rng.device).manual_seed(turn.rng.initial_seed())
        loss, metrics = self.objective.loss("student", cast, batch, replace(turn, rng=rng))
        return self.weight * loss, metrics
