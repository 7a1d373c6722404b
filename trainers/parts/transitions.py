"""How a sample gets from one time to another: sources of x_t, guided teachers, ODE steps and their inverse.

Every function takes `Denoiser`s and works on any path and any trailing shape.
"""

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.models.denoiser import Condition, Denoiser, expand, guide, renoise
from fewstep.models.paths import Path

from .objective import Batch, Turn

__all__ = ["NoisedData", "ddim_chain", "guided", "inverse_ddim", "noised", "renoise", "with_scale"]


def noised(path: Path, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """The forward process `alpha(t) x0 + sigma(t) noise`."""
    return expand(path.alpha(t), x0) * x0 + expand(path.sigma(t), x0) * noise


@dataclass(frozen=True)
class NoisedData:
    """x_t from data. `pure_at_start` replaces x_t at the noisiest time by noise alone, as samplers begin there.

    Stable Diffusion's path keeps alpha = 0.068 at its noisiest time: a student that learns to read that remnant of the
    data finds none of it when it samples (Lin et al. 2023, "Common diffusion noise schedules ... are flawed").
    """

    pure_at_start: bool = True

    def draw(self, path: Path, batch: Batch, t: Tensor, turn: Turn) -> Tensor:
        return self.mix(path, batch.x0, t, turn.noise(batch.x0))

    @property
    def mixing(self) -> "NoisedData":
        return self

    def at(self, teacher: Denoiser, batch: Batch, t: Tensor, noise: Tensor, cond: Condition) -> Tensor:
        """x_t of the batch and the noise that is given."""
        return self.mix(teacher.path, batch.x0, t, noise)

    def coefficients(self, path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
        """What x_t is mixed with, each [B]: alpha and sigma, or 0 and the start's scale."""
        pure = (t >= path.start) & self.pure_at_start
        alpha, sigma = path.alpha(t), path.sigma(t)
        return torch.where(pure, 0.0, alpha), torch.where(pure, _start_scale(path), sigma)

    def mix(self, path: Path, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t of samples [B, C, ...] and the noise that is theirs."""
        x_t = noised(path, x0, t, noise)
        if not self.pure_at_start:
            return x_t
        at_start = expand((t >= path.start).to(x_t.dtype), x_t)
        return torch.lerp(x_t, pure_noise(path, noise), at_start)


def pure_noise(path: Path, noise: Tensor) -> Tensor:
    """What a sampler starts from (`fewstep.runtime.sampling.samplers.path_start`)."""
    return noise * _start_scale(path)


def _start_scale(path: Path) -> float:
    from fewstep.runtime.sampling.samplers import path_start

    return path_start(path)


@dataclass(frozen=True)
class TeacherWalk:
    """x_t from the teacher's own walk down from noise, in `parts` even first-order steps, with no data (TLCM, STD).

    start: where the walk begins, as a share of the path; below 1 data noised to there (image to image).
    """

    parts: int = 4
    start: float = 1.0
    mixing: NoisedData = field(default_factory=NoisedData)

    def at(self, teacher: Denoiser, batch: Batch, t: Tensor, noise: Tensor, cond: Condition) -> Tensor:
        path = teacher.path
        first = torch.full_like(t, path.end + self.start * (path.start - path.end))
        x = self.mixing.mix(path, batch.x0, torch.maximum(t, first), noise)
        left = (first - t).clamp(min=0.0)
        steps = [t + left * (1.0 - k / self.parts) for k in range(self.parts + 1)]
        return ddim_chain(teacher, x, tuple(steps), cond)


def guided(teacher: Denoiser, uncond: Condition, w: Tensor) -> Denoiser:
    """The teacher under classifier-free guidance `u + w (c - u)`, both halves in one call of 2B rows.

    A condition tensor that `uncond` does not name (an edge map, a second time) is shared by both halves. Where every
    scale is 1 the teacher's own answer is meant, and where every scale is 0 that without a condition, in one call of B
    rows.
    """
    if bool((w == 1.0).all()):
        return teacher
    if bool((w == 0.0).all()):
        return Denoiser(lambda x, t, cond: teacher.raw(x, t, {**cond, **uncond}), teacher.path, teacher.prediction)

    def net(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        both = {name: torch.cat([uncond.get(name, value), value]) for name, value in cond.items()}
        without, with_ = teacher.raw(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return guide(without, with_, w)

    return Denoiser(net, teacher.path, teacher.prediction)


def without(cond: Condition, uncond: Condition, rows: Tensor) -> dict[str, Tensor]:
    """The condition, of nothing in these rows [B]."""
    return {
        name: torch.where(rows.to(value.device).reshape(-1, *([1] * (value.ndim - 1))), uncond.get(name, value), value)
        for name, value in cond.items()
    }


def with_scale(cond: Condition, w: Tensor) -> dict[str, Tensor]:
    """The condition with the guidance scale in it; networks without an input for it ignore it."""
    return {**cond, "w": w}


def ddim_chain(denoiser: Denoiser, x: Tensor, times: tuple[Tensor, ...], cond: Condition) -> Tensor:
    """First-order ODE steps through times[0], times[1], ...: DDIM on VP, Euler on EDM and flow, an arc on TrigFlow."""
    for t, s in pairwise(times):
        x = denoiser.jump(x, t, s, cond)
    return x


def inverse_ddim(path: Path, x_s: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The clean estimate whose one DDIM step takes x_t to x_s: `(x_s - r x_t) / (alpha_s - r alpha_t)`.

    r = sigma_s / sigma_t; Salimans & Ho 2022, the target x~ of algorithm 2.
    """
    ratio = path.sigma(s) / path.sigma(t)
    return (x_s - expand(ratio, x_s) * x_t) / expand(path.alpha(s) - ratio * path.alpha(t), x_s)
