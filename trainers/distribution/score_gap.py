"""The score gap: the student's samples move along the difference of the teacher's and the fake network's estimates."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.models.denoiser import Condition, Denoiser, expand
from fewstep.models.paths import Path

from ..errors import RecipeError
from ..parts.distances import Weight, unweighted
from ..parts.divergences import Divergence
from ..parts.laws import Law
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.rollout import Made
from ..parts.score_times import Window, draw_times
from ..parts.times import UniformScale
from ..parts.transitions import guided, without
from .backtrack import Trail
from .discriminator import critic_of
from .scores import carry, denoising_loss, dmd_gradient

# the oracle asks for the gradients by these names: what it checks is what the terms here call
__all__ = ["Denoise", "ScoreGap", "carry", "denoising_loss", "dmd_gradient", "signal_times_noise"]


def signal_times_noise(path: Path, t: Tensor) -> Tensor:
    """alpha sigma: turns a gap of clean estimates into `sigma^2` times that of noise estimates (VSD, SwiftBrush)."""
    return path.alpha(t) * path.sigma(t)


@dataclass(frozen=True, kw_only=True)
class ScoreGap:
    """`carry(x, h W weight(t) (mu_fake - mu_real))` at samples noised to `times`; DMD's W is `1 / mean|x - mu_real|`.

    guidance: the teacher's scale; cfg: whether it is applied here, or the teacher takes it in already. fake_cfg: the
    fake is guided too, at the same scale of each sample, so that the student takes in no guidance (SwiftBrush). floor:
    the least that `mean|x - mu_real|` counts as; None for W = 1 (Diff-Instruct). divergence: another than the reverse
    KL, by weights h of the critic's ratio. augment: times of its own, and noise, for the part that guidance adds,
    `(w - 1) (mu_cond - mu_uncond)` (Decoupled DMD). trail: who stands for the teacher as the run goes on (DisBack).
    """

    times: Law | Window
    guidance: UniformScale
    cfg: bool
    fake_cfg: bool = False
    floor: float | None = 1e-6
    weight: Weight = unweighted
    divergence: Divergence | None = None
    augment: Law | Window | None = None
    trail: Trail | None = None

    def __post_init__(self) -> None:
        if (self.fake_cfg or self.augment is not None) and not self.cfg:
            raise RecipeError(
                "a score gap with a guided fake or with split draws guides by two evaluations, and cfg is off: its "
                "teacher takes the scale in; leave these out, or take a teacher under classifier-free guidance"
            )

    @property
    def roles(self) -> tuple[str, ...]:
        return ("teacher", "fake", *(() if self.trail is None else self.trail.roles))

    @property
    def reads_ratio(self) -> bool:
        return self.divergence is not None

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        w, path = self.guidance.draw(len(made.x0), turn), cast["teacher"].path
        real = cast["teacher" if self.trail is None else self.trail.role(turn.progress)]
        teacher = guided(real, batch.uncond, w) if self.cfg else real
        fake = guided(cast["fake"], batch.uncond, w) if self.fake_cfg else cast["fake"]
        t, noise = draw_times(self.times, path, made, turn), turn.noise(made.x0)
        if self.augment is not None:
            there = draw_times(self.augment, path, made, turn), turn.noise(made.x0)
            teacher = augmented(teacher, real, made, *there)
        gradient = dmd_gradient(teacher, fake, made, t, noise, batch.cond, self.floor)
        scale = self.weight(path, t)
        if self.divergence is not None:
            with torch.no_grad():
                logits = critic_of(cast)(made.at(path, t, noise), t, batch.cond)
            scale = scale * self.divergence.weights(logits, path, t).to(scale)
        gradient = gradient * expand(scale, gradient)
        return carry(made.x0, gradient), {"dmd_gradient": float(gradient.square().mean().sqrt())}


def augmented(whole: Denoiser, plain: Denoiser, made: Made, t: Tensor, noise: Tensor) -> Denoiser:
    """What `plain` says anywhere, and what guidance adds to it, `whole - plain`, at one other noising of the sample.

    Where both noisings are one it is `whole`, bit for bit.
    """

    def net(x: Tensor, now: Tensor, cond: Condition) -> Tensor:
        there = made.at(plain.path, t, noise)
        return whole.x0(there, t, cond) + (plain.x0(x, now, cond) - plain.x0(there, t, cond))

    return Denoiser(net, plain.path, "x0")


@dataclass(frozen=True, kw_only=True)
class Denoise:
    """The fake network's own training: denoising score matching of the student's samples.

    guidance: the scale at which its estimate is the one that learns (Zhou et al. 2024, "Long and Short Guidance"); 0
    for a fake that is never told the condition. nulled: the share of rows that are not, so that it can be guided.
    """

    times: Law | Window
    weight: Weight
    guidance: float = 1.0
    nulled: float = 0.0

    roles = ("fake",)

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        count = len(made.x0)
        fake = guided(cast["fake"], batch.uncond, torch.full((count,), self.guidance))
        t = draw_times(self.times, fake.path, made, turn)
        noise, cond = turn.noise(made.x0), batch.cond
        if self.nulled:
            cond = without(cond, batch.uncond, turn.uniform(0.0, 1.0, count) < self.nulled)
        loss = denoising_loss(fake, made, t, noise, cond, self.weight)
        return loss, {"denoising": float(loss.detach())}
