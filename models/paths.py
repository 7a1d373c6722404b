"""Noise paths: how a clean sample x0 and noise eps mix at a time, `x_t = alpha(t) x0 + sigma(t) eps`.

t grows with noise. Every path answers in float64 and takes a Python float or a torch tensor of any shape, so plans can
be compiled without torch and trainers can use whole batches. The meeting point between paths is the EDM noise level
`s = sigma / alpha` (Karras et al. 2022): `path.level(t)` goes there and `path.time(s)` comes back.

| path | alpha | sigma | time | velocity dx/dt of one pair |
| --- | --- | --- | --- | --- |
| `VP` (discrete, Stable Diffusion) | sqrt(abar_n) | sqrt(1 - abar_n) | 0 .. N-1, real between | by `dalpha`, `dsigma` |
| `EDM` (variance exploding) | 1 | t | 0.002 .. 80 | eps |
| `RectifiedFlow` | 1 - t | t | 0 .. 1 | eps - x0 |
| `TrigFlow` | cos t | sigma_data sin t | 0 .. pi/2 | sigma_data cos t eps - sin t x0 |
"""

# mypy: disable-error-code="no-any-return"

import bisect
import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from .errors import SpecError

if TYPE_CHECKING:
    import torch

    Number = TypeVar("Number", float, torch.Tensor)
else:
    Number = TypeVar("Number")


CLEAN_VP = -1.0
"""How a network is told "clean data" on `VP`, whose own time of it is -inf: one step below the least noisy."""
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


class Path(Protocol):
    """What every path answers. `start` is the noisiest time a sampler may begin at, `end` the time of clean data."""

    kind: ClassVar[str]

    @property
    def start(self) -> float: ...
    @property
    def end(self) -> float: ...
    def alpha(self, t: Number) -> Number: ...
    def sigma(self, t: Number) -> Number: ...
    def dalpha(self, t: Number) -> Number: ...
    def dsigma(self, t: Number) -> Number: ...
    def level(self, t: Number) -> Number: ...
    def time(self, level: Number) -> Number: ...


def _f64(t: Any) -> Any:
    """A float stays a float; a tensor becomes float64."""
    return float(t) if isinstance(t, (int, float)) else t.double()


def _call(name: str, t: Any) -> Any:
    return getattr(math, name)(t) if isinstance(t, float) else getattr(t, name)()


def _check_range(start: float, end: float, noisiest: float) -> None:
    if not 0.0 <= end < start <= noisiest:
        raise SpecError(f"path.end {end} and path.start {start} must rise between 0 and {noisiest}")


@dataclass(frozen=True)
class RectifiedFlow:
    """Straight paths from data (t=0) to noise (t=1): Liu et al. 2022, Lipman et al. 2022."""

    kind: ClassVar[str] = "flow"
    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        _check_range(self.start, self.end, 1.0)

    def alpha(self, t: Number) -> Number:
        return 1.0 - _f64(t)

    def sigma(self, t: Number) -> Number:
        return _f64(t)

    def dalpha(self, t: Number) -> Number:
        return _f64(t) * 0.0 - 1.0

    def dsigma(self, t: Number) -> Number:
        return _f64(t) * 0.0 + 1.0

    def level(self, t: Number) -> Number:
        return _f64(t) / (1.0 - _f64(t))

    def time(self, level: Number) -> Number:
        return _f64(level) / (1.0 + _f64(level))


@dataclass(frozen=True)
class EDM:
    """Variance exploding with time = noise level: Karras et al. 2022."""

    kind: ClassVar[str] = "edm"
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.sigma_min < self.sigma_max:
            raise SpecError(
                f"path.sigma_min {self.sigma_min} must be below path.sigma_max {self.sigma_max}, both from 0 up"
            )
        if not self.sigma_data > 0.0:
            raise SpecError(f"path.sigma_data is {self.sigma_data}; it must be above 0")

    @property
    def start(self) -> float:
        return self.sigma_max

    @property
    def end(self) -> float:
        return self.sigma_min

    def alpha(self, t: Number) -> Number:
        return _f64(t) * 0.0 + 1.0

    def sigma(self, t: Number) -> Number:
        return _f64(t)

    def dalpha(self, t: Number) -> Number:
        return _f64(t) * 0.0

    def dsigma(self, t: Number) -> Number:
        return _f64(t) * 0.0 + 1.0

    def level(self, t: Number) -> Number:
        return _f64(t)

    def time(self, level: Number) -> Number:
        return _f64(level)


@dataclass(frozen=True)
class TrigFlow:
    """Spherical path of sCM (Lu & Song 2024): data and noise both have standard deviation `sigma_data`."""

    kind: ClassVar[str] = "trig"
    sigma_data: float = 1.0
    start: float = math.pi / 2
    end: float = 0.0

    def __post_init__(self) -> None:
        _check_range(self.start, self.end, math.pi / 2)
        if not self.sigma_data > 0.0:
            raise SpecError(f"path.sigma_data is {self.sigma_data}; it must be above 0")

    def alpha(self, t: Number) -> Number:
        return _call("cos", _f64(t))

    def sigma(self, t: Number) -> Number:
        return self.sigma_data * _call("sin", _f64(t))

    def dalpha(self, t: Number) -> Number:
        return -_call("sin", _f64(t))

    def dsigma(self, t: Number) -> Number:
        return self.sigma_data * _call("cos", _f64(t))

    def level(self, t: Number) -> Number:
        return self.sigma_data * _call("tan", _f64(t))

    def time(self, level: Number) -> Number:
        return _call("atan", _f64(level) / self.sigma_data)


@dataclass(frozen=True)
class VP:
    """Discrete variance-preserving path of DDPM / Stable Diffusion: `abar_n = prod(1 - beta)`, n = 0 .. N-1.

    Between integers log(sigma/alpha) is interpolated linearly, so `level` and `time` are inverse to each other.
    `beta_schedule` has diffusers' names and its float32 tables, so abar agrees with its schedulers to the last bit.
    """

    kind: ClassVar[str] = "vp"
    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    _tables: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.num_train_timesteps < 2:
            raise SpecError(f"path.num_train_timesteps is {self.num_train_timesteps}; it must be at least 2")
        if not 0.0 < self.beta_start <= self.beta_end < 1.0:
            raise SpecError(f"path.beta_start {self.beta_start} and beta_end {self.beta_end} must rise between 0 and 1")
        if self.beta_schedule not in BETA_SCHEDULES:
            raise SpecError(f"path.beta_schedule is {self.beta_schedule!r}; use one of {', '.join(BETA_SCHEDULES)}")

    @property
    def start(self) -> float:
        return float(self.num_train_timesteps - 1)

    @property
    def end(self) -> float:
        """The time of the least noisy training step, n = 0; its sigma is small but not zero, as in diffusers."""
        return 0.0

    @cached_property
    def abar(self) -> tuple[float, ...]:
        """Cumulative signal power per integer time, rounded to float32 where diffusers rounds."""
        import numpy as np

        n = self.num_train_timesteps
        if self.beta_schedule == "linear":
            betas = _linspace32(self.beta_start, self.beta_end, n)
        elif self.beta_schedule == "scaled_linear":
            root = _linspace32(self.beta_start**0.5, self.beta_end**0.5, n)
            betas = root * root
        else:
            bar = [math.cos((i / n + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(n + 1)]
            betas = np.asarray([min(1 - b / a, 0.999) for a, b in itertools.pairwise(bar)], dtype=np.float32)
        kept = np.float32(1.0) - betas
        bars = np.cumprod(kept.astype(np.float64)).astype(np.float32)  # torch accumulates float32 products in float64
        return tuple(float(b) for b in bars)

    @cached_property
    def _log_levels(self) -> tuple[float, ...]:
        return tuple(0.5 * math.log((1 - a) / a) for a in self.abar)

    def _log_level(self, t: Any) -> Any:
        t = _f64(t)
        if isinstance(t, float):
            low = min(max(math.floor(t), 0), self.num_train_timesteps - 2)
            a, b = self._log_levels[low], self._log_levels[low + 1]
            return a + (b - a) * (t - low)
        table = self._table(t)
        below = t.floor().clamp(0, self.num_train_timesteps - 2)
        first, second = table[below.long()], table[below.long() + 1]
        return first + (second - first) * (t - below)

    def _table(self, like: "torch.Tensor") -> "torch.Tensor":
        key = str(like.device)
        if key not in self._tables:
            self._tables[key] = like.new_tensor(self._log_levels)
        return self._tables[key]

    def _slope(self, t: Any) -> Any:
        """d log(sigma/alpha) / dt, piecewise constant."""
        t = _f64(t)
        low = (
            min(max(math.floor(t), 0), self.num_train_timesteps - 2)
            if isinstance(t, float)
            else t.floor().clamp(0, self.num_train_timesteps - 2)
        )
        return self._log_level(low + 1) - self._log_level(low)

    def alpha(self, t: Number) -> Number:
        return 1.0 / _call("sqrt", 1.0 + _call("exp", 2.0 * self._log_level(t)))

    def sigma(self, t: Number) -> Number:
        return 1.0 / _call("sqrt", 1.0 + _call("exp", -2.0 * self._log_level(t)))

    def dalpha(self, t: Number) -> Number:
        return -self.alpha(t) * self.sigma(t) ** 2 * self._slope(t)

    def dsigma(self, t: Number) -> Number:
        return self.sigma(t) * self.alpha(t) ** 2 * self._slope(t)

    def level(self, t: Number) -> Number:
        return _call("exp", self._log_level(t))

    def time(self, level: Number) -> Number:
        logs = self._log_levels
        if isinstance(level, (int, float)):
            wanted = math.log(float(level))
            low = min(max(bisect.bisect_right(logs, wanted) - 1, 0), len(logs) - 2)
            return low + (wanted - logs[low]) / (logs[low + 1] - logs[low])
        wanted_t = _f64(level).log()
        table = self._table(wanted_t)
        import torch

        low_t = (torch.searchsorted(table, wanted_t.contiguous(), right=True) - 1).clamp(0, len(logs) - 2)
        return low_t + (wanted_t - table[low_t]) / (table[low_t + 1] - table[low_t])


def _linspace32(start: float, stop: float, n: int) -> Any:
    """float32 linspace as torch computes it: from both ends, each entry one fused multiply-add of a float32 step.

    A float64 product and sum rounded once stands in for the fused operation, which numpy lacks.
    """
    import numpy as np

    step = np.float64(np.float32((np.float32(stop) - np.float32(start)) / np.float32(n - 1)))
    i = np.arange(n, dtype=np.float64)
    left = np.float64(np.float32(start)) + step * i
    right = np.float64(np.float32(stop)) - step * (n - 1 - i)
    return np.where(i < n // 2, left, right).astype(np.float32)


PATHS: dict[str, Any] = {cls.kind: cls for cls in (VP, EDM, RectifiedFlow, TrigFlow)}


def told_time(path: Path, t: float | None) -> float:
    """A time as a network's second time: as it is, and clean data (None) by a number too."""
    if t is None:
        return CLEAN_VP if path.kind == "vp" else 0.0
    return t


def path_to_json(path: Path) -> dict[str, Any]:
    settings = {k: v for k, v in asdict(path).items() if not k.startswith("_")}  # type: ignore[call-overload]
    return {"kind": path.kind, **settings}


def path_from_json(data: Mapping[str, Any]) -> Path:
    """Read a path's settings.

    Errors: `SpecError` naming an unknown kind, an unknown setting, or one of a wrong type or range.
    """
    kind = data.get("kind")
    if kind not in PATHS:
        raise SpecError(f"path.kind is {kind!r}; use one of {', '.join(PATHS)}")
    cls = PATHS[kind]
    settings = {k: v for k, v in data.items() if k != "kind"}
    known = {k for k in cls.__dataclass_fields__ if not k.startswith("_") and k != "kind"}
    if unknown := sorted(set(settings) - known):
        raise SpecError(f"path.{unknown[0]} is not a setting of a {kind!r} path; it has {', '.join(sorted(known))}")
    for name, value in settings.items():
        default = cls.__dataclass_fields__[name].default
        fits = isinstance(value, (int, float) if isinstance(default, float) else type(default))
        if not fits or isinstance(value, bool):
            raise SpecError(f"path.{name} is {value!r}; it must be {type(default).__name__}")
    path: Path = cls(**settings)
    return path
