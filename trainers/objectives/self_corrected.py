"""Self-corrected flow distillation (SCFlow, Dao et al. 2024, arXiv 2412.16906): consistency in both directions along
the teacher's flow, straightened by the student's own one-step samples, with an adversary on those.

With z^ the clean estimate, z1 noise and z^_t = z^(x_t, t):
`huber(z^_t, sg z^_down) + backward huber(z^_t, sg z^_up) + straight |z^((1-t) sg z^(z1) + t z1, t) - sg z^(z1)|^2 +
adversary softplus(-D)`. The last two make each line from noise to its own sample one on which the student stays.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.models.denoiser import Condition, Denoiser, expand
from fewstep.models.paths import Path

from ..distribution.discriminator import Adversary
from ..parts.distances import Distance, Squared
from ..parts.gan_losses import critic_loss, deceiver_loss
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.tangent import FLOW
from ..parts.times import UniformScale, clean
from ..parts.transitions import NoisedData, guided, noised, with_scale
from ..parts.u_shape import flow_time_to_path
from .straight import one_step


@dataclass(frozen=True)
class BothWays:
    """t even in flow time, and times below and above it, each at most `reach` away: (t, down, up).

    start_share: of the rows that begin at the noisiest time, where samplers do. anchor: where `down` lies below it, it
    is clean data and the sample itself the aim (the paper: 0.1 for text to image).
    """

    reach: float = 0.1
    start_share: float = 0.1
    anchor: float = 0.1

    def draw(self, path: Path, count: int, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        last = torch.full((count,), path.start, dtype=torch.float64, device=turn.rng.device)
        top = FLOW.time(path, last)
        tau = torch.where(turn.uniform(0.0, 1.0, count) < self.start_share, top, top * turn.uniform(0.0, 1.0, count))
        below = tau - turn.uniform(0.0, 1.0, count) * tau.clamp(max=self.reach)
        above = tau + turn.uniform(0.0, 1.0, count) * (top - tau).clamp(max=self.reach)
        t, down, up = (flow_time_to_path(path, each) for each in (tau, below, above))
        down = torch.where(below < self.anchor, torch.full_like(down, clean(path)), torch.minimum(down, t))
        return t, down, torch.maximum(up, t)


@dataclass(frozen=True, kw_only=True)
class SelfCorrected:
    """The parts of SCFlow. `adversary.student_weight` is its weight of the GAN; the critic is on noised samples."""

    times: BothWays
    source: NoisedData
    distance: Distance
    backward: float
    straight: float
    adversary: Adversary | None
    guidance: UniformScale
    cfg: bool
    target: str = "target"

    @property
    def players(self) -> tuple[str, ...]:
        return ("student",) if self.adversary is None else ("student", "fake")

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(("teacher", self.target, *self.players)))

    def loss(self, player: str, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        return self._student(cast, batch, turn) if player == "student" else self._critic(cast, batch, turn)

    def _student(self, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        student, target, count = cast["student"], cast[self.target], batch.x0.shape[0]
        path, w = student.path, self.guidance.draw(count, turn)
        cond = with_scale(batch.cond, w)
        teacher = guided(cast["teacher"], batch.uncond, w) if self.cfg else cast["teacher"]
        t, down, up = self.times.draw(path, count, turn)
        noise = turn.noise(batch.x0)
        with torch.no_grad():
            x_t = self.source.mix(path, batch.x0, t, noise)
            x0, eps = teacher.both(x_t, t, cond)
            known = expand(down == clean(path), x_t) > 0
            asked = torch.where(down == clean(path), t, down)  # no network answers at clean data
            below = self._answer(target, teacher.mix(x0, eps, asked), asked, cond, turn)
            below = torch.where(known, batch.x0, below)
            above = self._answer(target, teacher.mix(x0, eps, up), up, cond, turn)
        guess = self._answer(student, x_t, t, cond, turn)
        made = one_step(student, noise, cond, turn)
        line = self.source.mix(path, made.detach(), t, noise)
        found = {
            "consistency": self.distance(guess, below).mean(),
            "backward": self.distance(guess, above).mean(),
            "straight": Squared()(self._answer(student, line, t, cond, turn), made.detach()).mean(),
        }
        total = found["consistency"] + self.backward * found["backward"] + self.straight * found["straight"]
        if self.adversary is not None and cast.critic is not None:
            found["gan_student"] = self._deceive(cast, made, batch.cond, turn)
            total = total + self.adversary.student_weight * found["gan_student"]
        residual = float((guess.detach() - below).square().mean().sqrt())
        return total, {"residual": residual, **{name: float(term.detach()) for name, term in found.items()}}

    def _answer(self, network: Denoiser, x: Tensor, t: Tensor, cond: Condition, turn: Turn) -> Tensor:
        turn.share_dropout()
        return network.x0(x, t, cond)

    def _deceive(self, cast: Cast, made: Tensor, cond: Condition, turn: Turn) -> Tensor:
        assert self.adversary is not None and cast.critic is not None  # its caller looked
        rows = self.adversary.rows(len(made))
        seen, t, _ = self.adversary.shown(cast["student"].path, made[rows], turn)
        return deceiver_loss(cast.critic(seen, t, {name: value[rows] for name, value in cond.items()}))

    def _critic(self, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        """The critic on data against one-step samples, both with the same noise at the same time."""
        assert self.adversary is not None and cast.critic is not None  # the fake plays for it alone
        student, path = cast["student"], cast["student"].path
        rows = self.adversary.rows(batch.x0.shape[0])
        data, cond = batch.x0[rows], {name: value[rows] for name, value in batch.cond.items()}
        w = self.guidance.draw(len(data), turn)
        with torch.no_grad():
            made = one_step(student, turn.noise(data), with_scale(cond, w), turn)
        shown, t, noise = self.adversary.shown(path, data, turn)
        beside = made if self.adversary.times is None else noised(path, made, t, noise)
        real, fake = cast.critic(shown, t, cond), cast.critic(beside, t, cond)
        loss = critic_loss(real, fake)
        right = 0.5 * ((real > 0).float().mean() + (fake < 0).float().mean())
        return self.adversary.critic_weight * loss, {"gan_critic": float(loss.detach()), "critic_right": float(right)}
