"""Annealing reflow (SlimFlow, Zhu et al. 2024, arXiv 2407.12718): from independent noise to a teacher's own pairs.

A sample x^ that a teacher made from noise z is shown again with the noise `z' = sqrt(1 - beta^2) z + beta n`. At
beta = 1 that is plain training on independent noise, which a small network can begin with; at beta = 0 it is reflow
(Liu et al. 2022), after which one step is nearly exact. beta falls in between, so that a network which has no large
one's weights to start from reaches the second by way of the first.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from ..parts.distances import Distance, Weight
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.pairs import paired_noise
from ..parts.transitions import NoisedData
from .distillation import Times

KINDS = ("linear", "cosine", "exponential")


@dataclass(frozen=True)
class Annealing:
    """beta from 1 to 0 over the first `share` of the steps, and 0 after; SlimFlow's code has the three kinds.

    "exponential" is exp(-i / N) as there: its beta at the end of the share is 1/e, and it goes on falling.
    """

    share: float = 0.6
    kind: str = "linear"

    def beta(self, turn: Turn) -> float:
        along = turn.progress / self.share if self.share else math.inf
        if self.kind == "exponential":
            return math.exp(-along)
        left = max(0.0, 1.0 - along)
        return left if self.kind == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)

    def noise(self, paired: Tensor, turn: Turn) -> Tensor:
        """`sqrt(1 - beta^2) z + beta n` with fresh n: standard normal at every beta."""
        beta = self.beta(turn)
        return math.sqrt(1.0 - beta * beta) * paired + beta * turn.noise(paired)


@dataclass(frozen=True, kw_only=True)
class AnnealingReflow:
    """`weight |x_theta(x_t, t) - x^|^2` with x_t of x^ and the annealed noise, on any path.

    On rectified flow with the weight 1/t^2 it is SlimFlow's `|v - (z' - x^)|^2`. What the pairs were made under (a
    guidance scale) stands in their condition.
    """

    times: Times
    source: NoisedData
    distance: Distance
    weight: Weight
    anneal: Annealing

    players = ("student",)
    roles = ("student",)

    def loss(self, player: str, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        """Errors: `DataError` for a batch without the noise of its samples."""
        noise, student = paired_noise(batch), cast["student"]
        t = self.times.draw(student.path, batch.x0.shape[0], turn)
        x_t = self.source.mix(student.path, batch.x0, t, self.anneal.noise(noise, turn))
        guess = student.x0(x_t, t, batch.cond)
        loss = (self.distance(guess, batch.x0) * self.weight(student.path, t).to(guess)).mean()
        residual = float((guess.detach() - batch.x0).square().mean().sqrt())
        return loss, {"residual": residual, "beta": self.anneal.beta(turn)}
