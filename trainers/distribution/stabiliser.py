"""What guidance's part of a score gap does alone, and a law of two numbers that then holds the samples together.

Decoupled DMD (Liu et al. 2025, arXiv 2511.22677): guidance drives a student, and the matching of scores keeps it from
falling apart; a prior on each sample's mean and variance does so too, and needs no fake score.
"""

import math
from dataclasses import dataclass, replace

from torch import Tensor

from ..errors import RecipeError
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.rollout import Made
from .distribution import Around
from .score_gap import ScoreGap


@dataclass(frozen=True, kw_only=True)
class MeanVariance:
    """`weight` times `KL(N(m, V) || N(mean, variance)) = ((V + (m - mean)^2) / variance - 1 - ln(V / variance)) / 2`.

    m and V are a sample's own, over all its elements (V divides by their number); the loss is the mean over samples.
    mean, variance: in units of the latents that the denoiser sees; the paper's for SDXL are 0.075 and 0.81.
    Unverified: the weight; decided: by the recipe.

    Errors: `RecipeError` for a variance or a weight that is not above 0.
    """

    weight: float
    mean: float
    variance: float

    roles = ()

    def __post_init__(self) -> None:
        if min(self.weight, self.variance) <= 0.0:
            raise RecipeError(
                f"samples are held to the variance {self.variance} with weight {self.weight}; set both above 0"
            )

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        rows = made.x0.flatten(1).float()
        m = rows.mean(1)
        v = (rows - m[:, None]).square().mean(1).clamp(min=1e-12)  # a flat sample has no logarithm
        each = 0.5 * ((v + (m - self.mean).square()) / self.variance - 1.0 - v.log() + math.log(self.variance))
        loss = each.mean()
        return self.weight * loss, {"mean_variance": float(loss.detach()), "variance": float(v.detach().mean())}


@dataclass(frozen=True)
class GuidanceAlone(Around):
    """A score gap without its matching: x moves along `(w - 1) (mu_cond - mu_uncond)` at the gap's weights and times.

    The teacher's own estimate stands for the fake score's, so no fake is asked for, and draws are as in the gap.
    Nothing bounds it: give the student a stabiliser beside it.

    Errors: `RecipeError` for a gap in which nothing would be left.
    """

    term: ScoreGap

    def __post_init__(self) -> None:
        if not self.term.cfg or self.term.fake_cfg or self.term.reads_ratio:
            raise RecipeError(
                "guidance alone is the part of a score gap that its teacher adds by two evaluations: give it a gap "
                "with cfg on, and with neither a guided fake nor a divergence"
            )

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(role for role in self.term.roles if role != "fake")

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        theirs = replace(cast, roles={**cast.roles, "fake": cast["teacher"]})
        loss, metrics = self.term.loss(made, theirs, batch, turn)
        return loss, {f"guidance_{name}": value for name, value in metrics.items()}
