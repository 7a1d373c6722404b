"""The density ratio of data and samples as a critic tells it, and the student that climbs it with no teacher's score.

A critic trained with `gan_losses.Softplus` on noised data and samples has l = log(p_t / q_t) as its best logit, so
grad l is the gap of the two scores.
"""

from dataclasses import dataclass

from torch import Tensor

from fewstep.models.denoiser import Condition

from ..parts.distances import Weight
from ..parts.laws import Law
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.rollout import Made
from .discriminator import critic_of


def log_ratio(cast: Cast, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """l = log(p / q) at x_t, [B] float32 or finer: the mean of a sample's logits."""
    logits = critic_of(cast)(x_t, t, cond)
    logits = logits if logits.dtype.itemsize > 4 else logits.float()
    return logits.flatten(1).mean(1) if logits.ndim > 1 else logits


@dataclass(frozen=True, kw_only=True)
class ClimbRatio:
    """`-weight(t) l(x_t)`: distribution matching with grad l in place of the gap of the scores (no distillation).

    The gradient in x is `weight alpha (s_fake - s_real)`, s the scores.
    """

    times: Law
    weight: Weight

    roles = ()
    reads_ratio = True
    through_networks = True

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        path = cast["student"].path
        t = self.times.draw(path, len(made.x0), turn)
        ratio = log_ratio(cast, made.at(path, t, turn.noise(made.x0)), t, batch.cond)
        loss = -(self.weight(path, t).to(ratio) * ratio).mean() / made.x0[0].numel()
        return loss, {"log_ratio": float(ratio.detach().mean())}
