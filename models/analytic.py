"""Data whose diffusion is known in closed form: Gaussians and mixtures of them, on any path, in any shape.

Every answer is exact, so a network that gives it is a perfect teacher or a perfect student, and training and sampling
code can be run on it and compared with the truth. The formulas, for one component N(m, v^2) at coefficients (a, s):

    x_t ~ N(a m, a^2 v^2 + s^2)
    E[x0  | x_t] = m + a v^2 / (a^2 v^2 + s^2) (x_t - a m)
    E[eps | x_t] = s / (a^2 v^2 + s^2) (x_t - a m)
    flow map t -> u:  a_u m + sqrt((a_u^2 v^2 + s_u^2) / (a^2 v^2 + s^2)) (x_t - a m)

A condition shifts the data: all means move by the average of `ctx`, so `ctx = 0` is unconditional. Guidance between two
equal Gaussians is again a Gaussian whose shift is w times the condition's, which is why `takes_w` multiplies it by `w`.

Shapes: x is [B, C, ...], t is [B] in the path's native time, results are float64 unless said otherwise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .denoiser import Condition, Denoiser, expand
from .paths import Path
from .predictions import target
from .spec import Boundary

RK4_STEPS = 1000
Landing = Callable[[Tensor, Condition], Tensor]
"""(t [B], condition) -> the time [B] where one jump from t lands."""


@dataclass(frozen=True)
class Mixture:
    """`sum_k weights_k N(means_k, diag(stds_k^2))`: means [K, C, ...], stds that broadcast to them, weights [K]."""

    means: Tensor
    stds: Tensor
    weights: Tensor

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Samples [count, C, ...]."""
        chosen = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn((count, *self.means.shape[1:]), generator=generator, dtype=torch.float64)
        return self.means[chosen] + self.stds.expand_as(self.means)[chosen] * noise

    def moved(self, shift: Tensor | float) -> "Mixture":
        """The same data moved by `shift`, which broadcasts to one sample."""
        return Mixture(self.means + shift, self.stds, self.weights)


def mixture(means: Tensor, stds: Tensor, weights: Tensor) -> Mixture:
    """Components along the first axis of `means`; stds [K] or shaped as the means; weights need not sum to one."""
    means, stds, weights = means.double(), stds.double(), weights.double()
    if stds.ndim == 1:
        stds = stds.reshape(-1, *([1] * (means.ndim - 1)))
    if bool((stds <= 0).any()) or bool((weights <= 0).any()):
        raise ValueError("every standard deviation and weight of a mixture must be above 0")
    return Mixture(means, stds, weights / weights.sum())


def gaussian(mean: Tensor, std: Tensor | float) -> Mixture:
    """One Gaussian; `mean` has the shape of one sample, `std` broadcasts to it."""
    spread = torch.as_tensor(std, dtype=torch.float64).expand(mean.shape)
    return mixture(mean[None], spread[None], torch.ones(1))


def pushforward(generator: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Mixture:
    """The law of `generator(z)`, z standard noise, for a generator that is affine in each element: `B z + b`.

    This is the exact fake score's data in distribution matching. `shape` is one sample's.
    """
    ends = generator(torch.stack([torch.zeros(shape), torch.ones(shape)]).double()).detach().double()
    return gaussian(ends[0], (ends[1] - ends[0]).abs())


def posterior(data: Mixture, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(E[x0 | x], E[eps | x]), each shaped as x, for x = alpha x0 + sigma eps with alpha and sigma [B]."""
    apart, var = _components(data, x, alpha, sigma)
    share = torch.softmax(_log_parts(data, apart, var), dim=1)
    share = share.reshape(*share.shape, *([1] * (x.ndim - 1)))
    a, s = _columns(alpha, x), _columns(sigma, x)
    x0 = (share * (data.means + a * data.stds**2 / var * apart)).sum(1)
    eps = (share * (s / var * apart)).sum(1)
    return x0, eps


def log_density(data: Mixture, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """log p(x) [B] of the noised data."""
    apart, var = _components(data, x, alpha, sigma)
    dims = math.prod(x.shape[1:])
    return torch.logsumexp(_log_parts(data, apart, var), dim=1) - 0.5 * dims * math.log(2 * math.pi)


def score(data: Mixture, path: Path, x: Tensor, t: Tensor) -> Tensor:
    """grad log p_t(x) = -E[eps | x] / sigma(t)."""
    sigma = path.sigma(t)
    return -posterior(data, x, path.alpha(t), sigma)[1] / _row(sigma, x)


def flow_map(data: Mixture, path: Path, x: Tensor, t: Tensor, to: Tensor | None) -> Tensor:
    """Where the probability-flow ODE carries x from time t to time `to` (None: clean data).

    One Gaussian: closed form. A mixture: fourth-order Runge-Kutta over the angle of the noise, `RK4_STEPS` steps.
    """
    start = (path.alpha(t), path.sigma(t))
    end = _coefficients(path, to, t)
    if data.means.shape[0] == 1:
        (apart, var), (_, var_to) = _components(data, x, *start), _components(data, x, *end)
        moved = _columns(end[0], x) * data.means + (var_to / var).sqrt() * apart
        return moved[:, 0]
    return _runge_kutta(data, x, start, end)


def mean_velocity(data: Mixture, path: Path, x: Tensor, t: Tensor, to: Tensor) -> Tensor:
    """`(x_t - x_s) / (t - s)` along the flow map from t to s = `to`."""
    return (x.double() - flow_map(data, path, x, t, to)) / _row(t - to, x)


def exact(data: Mixture, path: Path, prediction: str, *, takes_w: bool = False) -> Denoiser:
    """The perfect denoiser of the data, as a network that speaks `prediction`."""

    def net(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        x0, eps = _shifted_posterior(data, path, x, t, _shift(cond, x, takes_w))
        return _raw(prediction, path, t, x0, eps, x)

    return Denoiser(net, path, prediction)


def jumper(data: Mixture, path: Path, prediction: str, to: Landing | None = None, *, takes_w: bool = False) -> Denoiser:
    """The perfect few-step student: `jump(x, t, to(t))` follows the flow map exactly, in one evaluation.

    `to=None` jumps to clean data, so `x0` is the consistency function.
    """

    def net(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        shift = _shift(cond, x, takes_w)
        landing = None if to is None else to(t, cond)
        x0, eps = _shifted_posterior(data, path, x, t, shift)
        y = _shifted_flow_map(data, path, x, t, landing, shift)
        a, s = _row(path.alpha(t), x), _row(path.sigma(t), x)
        a_to, s_to = (_row(c, x) for c in _coefficients(path, landing, t))
        det = a_to * s - s_to * a
        far = det.abs() > 1e-9  # a jump of no length follows the velocity, which the posterior gives
        det = torch.where(far, det, torch.ones_like(det))
        jump_x0 = torch.where(far, (s * y - s_to * x.double()) / det, x0)
        jump_eps = torch.where(far, (a_to * x.double() - a * y) / det, eps)
        return _raw(prediction, path, t, jump_x0, jump_eps, x)

    return Denoiser(net, path, prediction)


def consistency(
    data: Mixture, path: Path, prediction: str, boundary: Boundary | None = None, *, takes_w: bool = False
) -> Denoiser:
    """The perfect consistency model: `c_skip x + c_out x0` is the flow map to the path's end.

    With LCM's boundary scalings c_skip = 1 at the end itself, and what the network says plays no part there; without
    them c_skip = 0 and c_out = 1.
    """

    def net(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        end = torch.full_like(t, path.end, dtype=torch.float64)
        y = _shifted_flow_map(data, path, x, t, end, _shift(cond, x, takes_w))
        skip, out = (_row(c, x) for c in _scalings(boundary, t.double()))
        x0 = torch.where(out > 0, (y - skip * x.double()) / out.clamp(min=1e-30), y)
        eps = (x.double() - _row(path.alpha(t), x) * x0) / _row(path.sigma(t), x)
        return _raw(prediction, path, t, x0, eps, x)

    return Denoiser(net, path, prediction)


def _scalings(boundary: Boundary | None, t: Tensor) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) of Luo et al. 2023."""
    if boundary is None:
        return torch.zeros_like(t), torch.ones_like(t)
    scaled, square = boundary.timestep_scaling * t, boundary.sigma_data**2
    return square / (scaled**2 + square), scaled / (scaled**2 + square).sqrt()


def _shift(cond: Condition, x: Tensor, takes_w: bool) -> Tensor:
    """How far the condition moves the data, [B] float64; without `ctx`, not at all."""
    if "ctx" not in cond:
        return torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
    shift = cond["ctx"].double().flatten(1).mean(1)
    return shift * cond["w"].double() if takes_w and "w" in cond else shift


def _shifted_posterior(data: Mixture, path: Path, x: Tensor, t: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    alpha, sigma = path.alpha(t), path.sigma(t)
    x0, eps = posterior(data, x.double() - _row(alpha * shift, x), alpha, sigma)
    return x0 + _row(shift, x), eps


def _shifted_flow_map(data: Mixture, path: Path, x: Tensor, t: Tensor, to: Tensor | None, shift: Tensor) -> Tensor:
    alpha_to, _ = _coefficients(path, to, t)
    moved = flow_map(data, path, x.double() - _row(path.alpha(t) * shift, x), t, to)
    return moved + _row(alpha_to * shift, x)


def _raw(prediction: str, path: Path, t: Tensor, x0: Tensor, eps: Tensor, x: Tensor) -> Tensor:
    """F for the two estimates, in x's dtype: every prediction is linear in (x0, eps)."""
    f: Tensor = target(prediction, path, _row(t, x), x0, eps)
    return f.to(x.dtype)


def _coefficients(path: Path, to: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) [B] at time `to`; (1, 0) at clean data."""
    if to is None:
        one = torch.ones(like.shape, dtype=torch.float64, device=like.device)
        return one, torch.zeros_like(one)
    return path.alpha(to), path.sigma(to)


def _row(values: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1, ...] float64, to multiply one sample."""
    return expand(values, x.double())


def _columns(values: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, ...] float64, to multiply all components of one sample."""
    return _row(values, x)[:, None]


def _components(data: Mixture, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(x - alpha m_k, variance of x under component k), each [B, K, C, ...]."""
    a, s = _columns(alpha, x), _columns(sigma, x)
    apart = x.double()[:, None] - a * data.means
    return apart, a**2 * data.stds**2 + s**2


def _log_parts(data: Mixture, apart: Tensor, var: Tensor) -> Tensor:
    """log of weight times density of each component, [B, K], without the constant."""
    return data.weights.log() - 0.5 * (apart**2 / var + var.log()).flatten(2).sum(2)


def _runge_kutta(data: Mixture, x: Tensor, start: tuple[Tensor, Tensor], end: tuple[Tensor, Tensor]) -> Tensor:
    """Integrate in the angle of the noise, where every path is `cos x0 + sin eps` and nothing is infinite."""
    angle, last = torch.atan2(start[1], start[0]), torch.atan2(end[1], end[0])
    h = (last - angle) / RK4_STEPS

    def slope(u: Tensor, theta: Tensor) -> Tensor:
        cos, sin = theta.cos(), theta.sin()
        x0, eps = posterior(data, u, cos, sin)
        return _row(cos, u) * eps - _row(sin, u) * x0

    u, step = x.double() / _row(torch.hypot(*start), x), _row(h, x)
    for _ in range(RK4_STEPS):
        k1 = slope(u, angle)
        k2 = slope(u + 0.5 * step * k1, angle + 0.5 * h)
        k3 = slope(u + 0.5 * step * k2, angle + 0.5 * h)
        k4 = slope(u + step * k3, angle + h)
        u, angle = u + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4), angle + h
    return u * _row(torch.hypot(*end), x)
