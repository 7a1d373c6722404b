"""Consistency distillation with a reward on its own one-step samples (RG-LCD, Li et al. 2024)."""

from dataclasses import dataclass, field

from torch import Tensor

from ..distribution.rewarding import Agree, agreement
from ..networks.rewards import reward_of
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.times import UniformScale
from .consistency import Consistency


@dataclass(frozen=True, kw_only=True)
class RewardGuided:
    """`base - scale mean R(f_theta(x_t))`; the landing that the base compares is what is judged.

    proxied: R is a network on latents, a player of its own that learns to order the student's landings, the target's
    and the data as the reward does; only it sees pictures.
    """

    base: Consistency
    scale: float
    proxied: bool = False
    rule: Agree = field(default_factory=Agree)

    @property
    def players(self) -> tuple[str, ...]:
        return ("student", "proxy") if self.proxied else ("student",)

    @property
    def roles(self) -> tuple[str, ...]:
        return self.base.roles

    @property
    def two_times(self) -> bool:
        return self.base.two_times

    @property
    def guidance(self) -> UniformScale:
        return self.base.guidance

    def loss(self, player: str, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        found = self.base.landed(cast, batch, turn)
        if player == "proxy":
            return agreement(self.rule, [found.guess.detach(), found.aim, batch.x0], batch.cond, cast)
        if not self.scale:
            return found.loss, found.metrics
        by = "proxy" if self.proxied else "reward"
        judged = reward_of(cast, by)(found.guess, batch.cond).mean()
        return found.loss - self.scale * judged, {**found.metrics, by: float(judged.detach())}
