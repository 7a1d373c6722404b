"""How a sample gets from one time to another: sources of x_t, guided teachers, ODE steps and their inverse.

Every function takes `Denoiser`s and works on any path and any trailing shape.
"""

from dataclasses import dataclass
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

    def mix(self, path: Path, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t of samples [B, C, ...] and the noise that is theirs."""
        x_t = noised(path, x0, t, noise)
        if not self.pure_at_start:
            return x_t
        at_start = expand((t >= path.start).to(x_t.dtype), x_t)
        return torch.lerp(x_t, pure_noise(path, noise), at_start)


def pure_noise(path: Path, noise: Tensor) -> Tensor:
    """What a sampler starts from (`fewstep.runtime.samplers.path_start`)."""
    from fewstep.runtime.samplers import path_start

    return noise * path_start(path)


def guided(teacher: Denoiser, uncond: Condition, w: Tensor) -> Denoiser:
    """The teacher under classifier-free guidance `u + w (c - u)`, both halves in one call of 2B rows.

    A condition tensor that `uncond` does not name (an edge map, a second time) is shared by both halves.
    """

    def net(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        both = {name: torch.cat([uncond.get(name, value), value]) for name, value in cond.items()}
        without, with_ = teacher.raw(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return guide(without, with_, w)

    return Denoiser(net, teacher.path, teacher.prediction)


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
