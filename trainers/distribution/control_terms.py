"""The condition's side of joint distribution matching (JDM): samples should show the control they were asked for.

`KL(p(x, c) || q(x) q(c | x)) = E_c KL(p(x | c) || q(x)) - E log q(c | x) + const`: with the teacher's law for q(x) the
first part is a score gap whose fake is told the control and whose teacher is not; the second is here.
"""

from dataclasses import dataclass

from torch import Tensor

from ..networks.rewards import reward_of
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.rollout import Made

CONTROL = "control"
"""What a cast calls its likelihood of the control, `log q(c | x)` [B] of (samples, condition) up to a constant."""


@dataclass(frozen=True, kw_only=True)
class Follow:
    """`-weight mean log q(c | x0) / elements`: a detector's discrepancy, `|detect(x0) - c|^2 / (2 tau^2)`.

    Divided by a sample's elements, as the score gap's surrogate is, so that a weight survives a change of size.
    """

    weight: float

    roles = ()
    through_networks = True

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        seen = reward_of(cast, CONTROL)(made.x0, batch.cond).mean() / made.x0[0].numel()
        return -self.weight * seen, {"follows": float(seen.detach())}
