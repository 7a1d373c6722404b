"""The stage of the oracle suite: data with known answers, perfect networks with weights to differentiate, and checks.

Everything is float64 and small. A perfect network is wrapped as `Bent`, whose two weights are zero where it is perfect.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models import analytic
from fewstep.models.analytic import Landing, Mixture
from fewstep.models.denoiser import Condition, Denoiser
from fewstep.models.paths import VP, Path
from fewstep.models.spec import Boundary, Guidance, Latent, SamplerSpec

from ..parts.objective import Batch, Turn
from ..parts.times import EvenGrids
from ..recipes.recipe import Recipe, Sampling

SHAPE = (2, 3)
SHIFT = 0.4
"""How far the condition moves the data of the suite."""


@dataclass(frozen=True)
class Check:
    """One measured number and where it must lie."""

    name: str
    value: float
    low: float
    high: float

    @property
    def passed(self) -> bool:
        return self.low <= self.value <= self.high  # false for NaN

    def to_json(self) -> dict[str, Any]:
        value = self.value if math.isfinite(self.value) else None
        return {"name": self.name, "passed": self.passed, "value": value, "low": self.low, "high": self.high}


def below(name: str, value: float | Tensor, bound: float) -> Check:
    """An error that must vanish up to `bound`; the largest entry of a tensor counts."""
    if isinstance(value, Tensor):
        value = float(value.detach().abs().max())
    return Check(name, abs(float(value)), 0.0, bound)


def between(name: str, value: float | Tensor, low: float, high: float) -> Check:
    return Check(name, float(value), low, high)


def holds(name: str, truth: bool) -> Check:
    return Check(name, float(truth), 1.0, 1.0)


def grad_of(weight: Tensor) -> Tensor:
    """The gradient that has reached a weight or a sample. Errors: `AssertionError` where none has."""
    assert weight.grad is not None, "no gradient has reached it"
    return weight.grad


class Bent(nn.Module):
    """A perfect network plus `gain x + offset`; both weights are zero unless said."""

    def __init__(self, perfect: Denoiser, gain: float = 0.0, offset: float = 0.0) -> None:
        super().__init__()
        self.perfect = perfect
        self.gain = nn.Parameter(torch.tensor(gain, dtype=torch.float64))
        self.offset = nn.Parameter(torch.tensor(offset, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.perfect.raw(x, t, cond) + self.gain * x + self.offset

    def denoiser(self) -> Denoiser:
        return Denoiser(self, self.perfect.path, self.perfect.prediction)


class MeanCritic(nn.Module):
    """A critic of two weights: `gain mean(x) + offset`, [B]."""

    def __init__(self, gain: float = 1.0, offset: float = 0.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain, dtype=torch.float64))
        self.offset = nn.Parameter(torch.tensor(offset, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.answer(self.features(x, t, cond), cond)

    def features(self, x: Tensor, t: Tensor, cond: Condition) -> list[Tensor]:
        return [x]

    def answer(self, features: list[Tensor], cond: Condition) -> Tensor:
        return self.gain * features[0].flatten(1).mean(1) + self.offset


LIKED = 1.0


def liking(x: Tensor, cond: Condition) -> Tensor:
    """The suite's reward: `-mean (x - LIKED)^2 / 2`, whose gradient is `(LIKED - x) / elements`. [B]."""
    return -0.5 * (x - LIKED).square().flatten(1).mean(1)


class MeanReward(nn.Module):
    """A proxy of two weights: `gain R(x) + offset`, right at (1, any)."""

    def __init__(self, gain: float = 0.5, offset: float = 0.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain, dtype=torch.float64))
        self.offset = nn.Parameter(torch.tensor(offset, dtype=torch.float64))

    def forward(self, x: Tensor, cond: Condition) -> Tensor:
        return self.gain * liking(x, cond) + self.offset


@dataclass(frozen=True)
class World:
    """One Gaussian on one path, and perfect networks for it."""

    path: Path
    prediction: str
    data: Mixture

    def batch(self, count: int, seed: int = 0) -> Batch:
        rng = torch.Generator().manual_seed(seed)
        x0 = self.data.draw(count, rng) + SHIFT
        ctx = torch.full((count, 1, 1), SHIFT, dtype=torch.float64)
        return Batch(x0, {"ctx": ctx}, {"ctx": torch.zeros_like(ctx)})

    def marginal(self, t: Tensor, seed: int = 1) -> Tensor:
        """Conditional samples noised to t [B]."""
        rng = torch.Generator().manual_seed(seed)
        x0 = self.data.draw(t.shape[0], rng) + SHIFT
        noise = torch.randn(x0.shape, generator=rng, dtype=torch.float64)
        column = t.reshape(-1, *([1] * (x0.ndim - 1)))
        return self.path.alpha(column) * x0 + self.path.sigma(column) * noise

    def teacher(self, *, takes_w: bool = False) -> Denoiser:
        return analytic.exact(self.data, self.path, self.prediction, takes_w=takes_w)

    def consistency(self, boundary: Boundary | None = None, *, takes_w: bool = False) -> Denoiser:
        return analytic.consistency(self.data, self.path, self.prediction, boundary, takes_w=takes_w)

    def jumper(self, to: Landing | None, *, takes_w: bool = False) -> Denoiser:
        return analytic.jumper(self.data, self.path, self.prediction, to, takes_w=takes_w)


def world(path: Path | None = None, prediction: str = "v", mean: float = 0.3, std: float = 0.6) -> World:
    """Data N(mean, std^2) per element, a little uneven so that no two elements are alike."""
    slope = torch.linspace(-0.2, 0.2, math.prod(SHAPE), dtype=torch.float64).reshape(SHAPE)
    return World(path or VP(), prediction, analytic.gaussian(mean + slope, std + 0.5 * slope))


def absorbed(denoiser: Denoiser, w: float) -> Denoiser:
    """The denoiser under guidance w in one evaluation: the condition's shift is multiplied by w."""

    def net(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return denoiser.raw(x, t, {**{k: v for k, v in cond.items() if k != "w"}, "ctx": cond["ctx"] * w})

    return Denoiser(net, denoiser.path, denoiser.prediction)


def turn(step: int = 0, player: str = "student") -> Turn:
    return Turn.of(0, step, 100, player)


def rms(value: Tensor) -> float:
    return float(value.detach().square().mean().sqrt())


def slope_of(loss: Callable[[], Tensor], weight: nn.Parameter, h: float = 1e-3) -> float:
    """Central difference of a loss in one weight."""
    with torch.no_grad():
        weight.add_(h)
        high = float(loss().detach())
        weight.sub_(2 * h)
        low = float(loss().detach())
        weight.add_(h)
    return (high - low) / (2 * h)


def gradient_checks(
    label: str, loss: Callable[[], Tensor], learner: nn.Module, bound: float = 0.01, h: float = 1e-3
) -> Iterator[Check]:
    """Each weight's gradient, which a backward pass of `loss` has left, against differences of it."""
    for name, weight in learner.named_parameters():
        found = 0.0 if weight.grad is None else float(weight.grad)
        yield below(f"{label}gradient of {name} against differences", found / slope_of(loss, weight, h) - 1.0, bound)


AS_TEACHER = Sampling(
    sampler="ddim", grids=EvenGrids((4, 8, 25)), stochastic=False, guidance_mode="cfg", guidance_default=3.0,
    guidance_range=(1.0, 10.0),
)  # fmt: skip
"""What stands for the contract of a student that is sampled as its teacher."""


def recipe_spec(recipe: Recipe, path: Path, prediction: str) -> SamplerSpec:
    """The sampling contract a recipe's student gets, on a path."""
    s: Sampling = recipe.sampling or AS_TEACHER
    return SamplerSpec(
        prediction=prediction,
        path=path,
        sampler=s.sampler,
        grids=s.grids.of(path),
        stochastic=s.stochastic,
        guidance=Guidance(mode=s.guidance_mode, default=s.guidance_default, range=s.guidance_range),
        boundary=s.boundary,
        gamma=s.gamma,
        phases=s.phases,
        latent=Latent(channels=SHAPE[0], factor=8, scale=1.0),
        sizes=((64, 64),),
        recipe=recipe.name,
    )
