"""One contract for every network: noisy sample and time in, clean estimate out.

Shapes: x is [B, C, ...] with any number of trailing axes; t, s and w are [B] float tensors in the path's native time; a
condition is a mapping of named tensors, each with leading B (`ctx` [B, L, D], `pooled`, `control`, ...).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .paths import Path
from .predictions import check_prediction, estimates

Condition = Mapping[str, Tensor]
Network = Callable[[Tensor, Tensor, Condition], Tensor]
"""(x [B, C, ...], t [B], condition) -> raw output F, shaped as x. A network that takes the guidance scale or a second
time finds them in the condition as `w` [B] and `s` [B]."""


def expand(values: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1, ...] in x's dtype, so it multiplies x."""
    return values.to(device=x.device, dtype=x.dtype).reshape(-1, *([1] * (x.ndim - 1)))


def guide(uncond: Tensor, cond: Tensor, w: Tensor | float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022) in the one convention used everywhere: `u + w (c - u)`.

    w = 1 means no guidance. The convention `c + omega (c - u)` of the LCM paper has w = 1 + omega.
    """
    scale = expand(w, cond) if isinstance(w, Tensor) else w
    return uncond + scale * (cond - uncond)


@dataclass(frozen=True)
class Denoiser:
    """A network, its path and what its output means."""

    net: Network
    path: Path
    prediction: str

    def __post_init__(self) -> None:
        check_prediction(self.prediction, self.path)

    def raw(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """F, shaped as x."""
        return self.net(x, t, cond)

    def both(self, x: Tensor, t: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
        """(x0, eps) estimates from one evaluation."""
        return self.split(x, t, self.raw(x, t, cond))

    def split(self, x: Tensor, t: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, eps) from a raw output that is already there."""
        c = estimates(self.prediction, self.path, t)
        x0 = expand(c.x0_x, x) * x + expand(c.x0_f, x) * f
        eps = expand(c.eps_x, x) * x + expand(c.eps_f, x) * f
        return x0, eps

    def x0(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.both(x, t, cond)[0]

    def eps(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.both(x, t, cond)[1]

    def velocity(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """dx/dt of the probability-flow ODE in the path's native time: `alpha' x0 + sigma' eps`."""
        x0, eps = self.both(x, t, cond)
        return expand(self.path.dalpha(t), x) * x0 + expand(self.path.dsigma(t), x) * eps

    def jump(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
        """One step from time t to time s, with both estimates frozen (DDIM, Song et al. 2020; Euler on EDM, flow)."""
        x0, eps = self.both(x, t, cond)
        return self.mix(x0, eps, s)

    def mix(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """`alpha(t) x0 + sigma(t) eps`, the forward process."""
        return expand(self.path.alpha(t), x0) * x0 + expand(self.path.sigma(t), x0) * eps

    def guided(self, uncond: Condition, w: Tensor | float) -> "Denoiser":
        """The same denoiser under guidance: two evaluations, each in its own condition, combined by `guide`."""

        def net(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
            return guide(self.net(x, t, uncond), self.net(x, t, cond), w)

        return Denoiser(net, self.path, self.prediction)


def renoise(path: Path, x: Tensor, s: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Exact forward step from time s to a noisier time t: `(a_t/a_s) x + sqrt(sig_t^2 - (a_t/a_s)^2 sig_s^2) n`."""
    ratio = path.alpha(t) / path.alpha(s)
    spread = (path.sigma(t) ** 2 - ratio**2 * path.sigma(s) ** 2).clamp(min=0).sqrt()
    return expand(ratio, x) * x + expand(spread, x) * noise


def times(value: float, x: Tensor) -> Tensor:
    """One time for the whole batch, [B] float64."""
    return torch.full((x.shape[0],), value, dtype=torch.float64, device=x.device)
