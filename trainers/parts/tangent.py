"""How an output of a network changes along a trajectory: forward-mode derivative, central difference, one-sided step.

Trajectories are followed on a hub, a path on which every other can be seen: with k = 1 / hypot(alpha, sigma) or
1 / (alpha + sigma), `k x = a x0 + b eps` is TrigFlow's angle or rectified flow's time. So an objective that is stated
on one of the two runs on a student of any path, with no change of its network.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fewstep.models.denoiser import Condition, Denoiser, expand
from fewstep.models.paths import Path

from ..errors import RecipeError
from .objective import Batch

Curve = Callable[[Tensor, Tensor], Tensor]
"""(x [B, C, ...], t [B]) -> an output shaped as x."""


class Tangent(Protocol):
    def __call__(self, f: Curve, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor) -> Tensor:
        """`df(x, t)` in the direction (dx, dt), shaped as x, without gradient."""
        ...


@dataclass(frozen=True)
class Jvp:
    """Exact, by forward-mode differentiation: one evaluation that costs about two.

    Attention runs as plain products, since the fused kernels have no forward derivative; all in float32, since autocast
    casts the weights and not an input that carries a derivative (and a tangent needs the digits).

    Errors: `RecipeError` for a network with an operation that has none.
    """

    def __call__(self, f: Curve, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor) -> Tensor:
        try:
            full = torch.autocast(x.device.type, enabled=False)
            with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH), _ContiguousNorms(), full:
                # the first forward derivative scripts functions of torch's own
                warnings.simplefilter("ignore", DeprecationWarning)
                found: Tensor = torch.func.jvp(f, (x, t), (dx.to(x.dtype), dt.to(t.dtype)))[1]
        except RuntimeError as error:
            text = str(error)
            if "forward AD" in text or "functorch" in text:
                raise RecipeError(
                    f"this network has no forward derivative ({error}); set difference above 0, a step of its own"
                ) from error
            raise
        return found.detach()


class _ContiguousNorms(TorchFunctionMode):
    """torch's forward derivative of a group norm takes views that channels-last tensors do not have."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.group_norm:
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Difference:
    """`(f(x + h dx, t + h dt) - f(x - h dx, t - h dt)) / 2h`, of second order in h (AnyFlow: h = 0.005)."""

    h: float = 0.005

    def __call__(self, f: Curve, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor) -> Tensor:
        with torch.no_grad():
            ahead, behind = (f(x + k * dx, t + k * dt) for k in (self.h, -self.h))
            return (ahead - behind) / (2.0 * self.h)


@dataclass(frozen=True)
class Discrete:
    """`(f(x, t) - f(x - h dx, t - h dt)) / h`, of first order: the limit that discrete consistency takes."""

    h: float = 0.005

    def __call__(self, f: Curve, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor) -> Tensor:
        with torch.no_grad():
            return (f(x, t) - f(x - self.h * dx, t - self.h * dt)) / self.h


def tangent_of(difference: float) -> Tangent:
    """Exact at 0, else by central differences of that width."""
    return Difference(difference) if difference else Jvp()


@dataclass(frozen=True)
class Hub:
    """TrigFlow of unit data ("angle") or rectified flow ("flow"), as seen from any path."""

    kind: str

    def scale(self, path: Path, t: Tensor) -> Tensor:
        """k [B], so that k x is the state on the hub."""
        alpha, sigma = path.alpha(t), path.sigma(t)
        return 1.0 / (torch.hypot(alpha, sigma) if self.kind == "angle" else alpha + sigma)

    def mix(self, path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b), each [B]: how much of sample and noise there is; cosine and sine, or 1 - tau and tau."""
        k = self.scale(path, t)
        return k * path.alpha(t), k * path.sigma(t)

    def time(self, path: Path, t: Tensor) -> Tensor:
        """The hub's own time [B]."""
        a, b = self.mix(path, t)
        return torch.atan2(b, a) if self.kind == "angle" else b

    def pace(self, path: Path, t: Tensor) -> Tensor:
        """d hub time / d native time, [B]."""
        k = self.scale(path, t)
        return k**2 * (path.dsigma(t) * path.alpha(t) - path.dalpha(t) * path.sigma(t))

    def velocity(self, path: Path, t: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
        """d (k x) / d hub time of the two estimates: `cos eps - sin x0`, or `eps - x0`."""
        if self.kind == "flow":
            return eps - x0
        a, b = self.mix(path, t)
        return expand(a, x0) * eps - expand(b, x0) * x0

    def ask(self, network: Denoiser, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """A network's velocity on the hub; of a two-time network the mean velocity down to `s` of its condition."""
        return self.velocity(network.path, t, *network.both(x, t, cond))

    def along(
        self, path: Path, x0: Tensor, eps: Tensor, t: Tensor, scale: Tensor | float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """(dx, dt), `scale` times the direction in which a hub second passes, of trajectories with these estimates."""
        dt = scale / self.pace(path, t)
        return expand(path.dalpha(t) * dt, x0) * x0 + expand(path.dsigma(t) * dt, x0) * eps, dt


ANGLE, FLOW = Hub("angle"), Hub("flow")


class Field(Protocol):
    """Whose trajectory passes through x_t: (x0, eps) of it."""

    def __call__(
        self, teacher: Denoiser, batch: Batch, noise: Tensor, x: Tensor, t: Tensor, cond: Condition
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class TeacherField:
    """The teacher's: distillation."""

    def __call__(
        self, teacher: Denoiser, batch: Batch, noise: Tensor, x: Tensor, t: Tensor, cond: Condition
    ) -> tuple[Tensor, Tensor]:
        return teacher.both(x, t, cond)


@dataclass(frozen=True)
class DataField:
    """The pair that x_t was mixed of: right in the mean, with no teacher (training)."""

    def __call__(
        self, teacher: Denoiser, batch: Batch, noise: Tensor, x: Tensor, t: Tensor, cond: Condition
    ) -> tuple[Tensor, Tensor]:
        return batch.x0, noise
