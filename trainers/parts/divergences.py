"""f-divergences beside the reverse KL: how much each sample's score gap counts, by the ratio of the two densities.

The gradient of D_f(p || q) in a sample is that of the reverse KL times `h(r) = r^2 f''(r)`, r = p / q, which a critic
with softplus losses knows as the exponential of its logit (Xu et al. 2025, arXiv 2502.15681).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.models.paths import Path

from ..errors import RecipeError

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rkl": torch.ones_like,
    "kl": lambda r: r,
    "js": lambda r: r / (1.0 + r),
    "softened": lambda r: 1.0 / (1.0 + r),
    "neyman": lambda r: 1.0 / r,
    "hellinger": torch.sqrt,
    "jeffreys": lambda r: 1.0 + r,
}
"""h(r): reverse and forward KL, Jensen-Shannon, softened reverse KL, Neyman's chi-square, Hellinger, Jeffreys."""


@dataclass(frozen=True)
class Divergence:
    """Which one, and how a learned ratio is calmed.

    clamp: bound of the logit. bins: equal parts of the path; in each the ratio is divided by its mean over the batch,
    since the mean of p / q over q is 1 at every time; 0 leaves it. low, high: bounds of it then.
    """

    whole_batch = True  # weights are told relative to those of the batch

    kind: str = "js"
    bins: int = 10
    clamp: float = 10.0
    low: float = 0.1
    high: float = 20.0

    def __post_init__(self) -> None:
        if self.kind not in WEIGHTS:
            raise RecipeError(f"the divergence is {self.kind!r}; known are {', '.join(WEIGHTS)}")

    def ratio(self, logits: Tensor, path: Path, t: Tensor) -> Tensor:
        """p / q at x_t [B]; a sample's logits [B, ...] are averaged."""
        r = logits.double().reshape(len(logits), -1).mean(1).clamp(-self.clamp, self.clamp).exp()
        if not self.bins:
            return r
        part = ((t - path.end) / (path.start - path.end) * self.bins).long().clamp(0, self.bins - 1).to(r.device)
        total = torch.zeros(self.bins, dtype=r.dtype, device=r.device).index_add_(0, part, r)
        count = torch.bincount(part, minlength=self.bins).clamp(min=1)
        return (r / (total / count)[part]).clamp(self.low, self.high)

    def weights(self, logits: Tensor, path: Path, t: Tensor) -> Tensor:
        """h [B], of mean 1 over the batch."""
        h = WEIGHTS[self.kind](self.ratio(logits, path, t))
        return h / h.mean()
