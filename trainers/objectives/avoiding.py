"""Guidance away from a prompt that is drawn, which the student is told (SpeedUpNet, Chai et al. 2023).

Whatever method is within, its teacher is guided by `n + w (c - n)`, n the estimate under a prompt to avoid: the empty
one, or that of another sample of the batch. The student is told n's conditions beside its own, under `neg_` names.
"""

from dataclasses import dataclass, replace

import torch

from fewstep.models.denoiser import expand

from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.times import UniformScale
from .consistency import Consistency
from .guidance import GuidanceDistillation

SHARED = ("w", "size_ids")
"""Conditions that say nothing of what is avoided."""


@dataclass(frozen=True, kw_only=True)
class Avoiding:
    """A method under guidance, away from the empty prompt in the share `empty` of the rows, else from another's."""

    inner: Consistency | GuidanceDistillation
    empty: float = 0.5

    players = ("student",)

    whole_batch = True  # a prompt to avoid is another sample's

    @property
    def roles(self) -> tuple[str, ...]:
        return self.inner.roles

    @property
    def two_times(self) -> bool:
        return getattr(self.inner, "two_times", False)

    @property
    def guidance(self) -> UniformScale:
        return self.inner.guidance

    def loss(self, player: str, cast: Cast, batch: Batch, turn: Turn) -> tuple[torch.Tensor, Metrics]:
        return self.inner.loss(player, cast, self.told(batch, turn), turn)

    def told(self, batch: Batch, turn: Turn) -> Batch:
        """The batch with prompts to avoid: in the place of the empty one, and told beside the conditions."""
        count = batch.x0.shape[0]
        other = (torch.arange(count, device=turn.rng.device) + 1 + turn.integers(max(1, count - 1), count)) % count
        nothing = turn.uniform(0.0, 1.0, count) < self.empty
        avoided = {
            name: value if name in SHARED else torch.where(expand(nothing, value) > 0, value, batch.cond[name][other])
            for name, value in batch.uncond.items()
        }
        told = {f"neg_{name}": value for name, value in avoided.items() if name not in SHARED}
        scale = torch.ones(count, device=batch.x0.device)
        return replace(batch, cond={**batch.cond, **told, "neg_scale": scale}, uncond=avoided)
