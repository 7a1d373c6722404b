"""The anchor of distribution matching: at a teacher's pairs of noise and sample the student gives the sample (DMD)."""

from dataclasses import dataclass

from torch import Tensor

from fewstep.models.denoiser import times

from ..parts.distances import Distance
from ..parts.jumps import Jump
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.pairs import paired_noise
from ..parts.rollout import Made
from ..parts.times import clean
from ..parts.transitions import pure_noise


@dataclass(frozen=True, kw_only=True)
class Regress:
    """`weight distance(G(z), y)` on the batch's pairs (z, y), one step from the noisiest time."""

    jump: Jump
    distance: Distance
    weight: float

    roles = ("student",)
    of_samples = False

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        student = cast["student"]
        start = pure_noise(student.path, paired_noise(batch))
        t, end = times(student.path.start, start), times(clean(student.path), start)
        loss = self.distance(self.jump(student, start, t, end, batch.cond), batch.x0).mean()
        return self.weight * loss, {"regression": float(loss.detach())}
