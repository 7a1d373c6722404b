"""Few-step samplers as coefficients. Each step of each method is `x_next = A x + B F + C z`, z fresh standard noise.

A multistep solver adds `D m`, m the clean estimate of the step before.

A sampler here is a function from one step (its time, where it lands, and what the network's output means) to (A, B, C).
Nothing is evaluated: plans hold the numbers, and one fused update applies them to rows of any mix
(`runtime.sampling.step`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from fewstep.models.paths import Path
from fewstep.models.predictions import Affine, estimates
from fewstep.models.spec import SamplerSpec


@dataclass(frozen=True)
class Update:
    """Coefficients of one row's update.

    lands: the time to which what the network says is taken, before fresh noise comes on top; None for clean data. A
    network with a second time is told it. keep: the clean estimate as (of x, of F), where the next step needs it.
    """

    a: float
    b: float
    c: float
    d: float = 0.0
    keep: tuple[float, float] | None = None
    lands: float | None = None


@dataclass(frozen=True)
class Step:
    """One step: from time t to time `to` (None: to clean data), `last` where no noise may follow.

    before: the time of the step before, None at the first.
    """

    t: float
    to: float | None
    last: bool
    path: Path
    out: Affine
    before: float | None = None

    def land(self) -> tuple[float, float]:
        """(alpha, sigma) where the step lands."""
        return (1.0, 0.0) if self.to is None else (self.path.alpha(self.to), self.path.sigma(self.to))


def ddim(step: Step, spec: SamplerSpec) -> Update:
    """Deterministic: `a' x0 + s' eps`. DDIM (Song et al. 2020), Euler on flow paths, PCM's phase chain, flow maps."""
    alpha, sigma = step.land()
    out = step.out
    return Update(alpha * out.x0_x + sigma * out.eps_x, alpha * out.x0_f + sigma * out.eps_f, 0.0, lands=step.to)


def lcm(step: Step, spec: SamplerSpec) -> Update:
    """Multistep consistency sampling (Luo et al. 2023): denoise with boundary scalings, then fresh noise at `to`."""
    skip, out = 0.0, 1.0
    if spec.boundary is not None:
        scaled = spec.boundary.timestep_scaling * step.t
        square = spec.boundary.sigma_data**2
        skip, out = square / (scaled**2 + square), scaled / math.sqrt(scaled**2 + square)
    alpha, sigma = (1.0, 0.0) if step.last else step.land()
    return Update(alpha * (skip + out * step.out.x0_x), alpha * out * step.out.x0_f, sigma)


def euler_ancestral(step: Step, spec: SamplerSpec) -> Update:
    """Ancestral Euler (k-diffusion; SD-Turbo's): down to `sigma_down`, then noise up to `to`, in levels sigma/alpha."""
    if step.to is None:
        return ddim(step, spec)
    alpha = step.path.alpha(step.to)
    level = step.path.level(step.to)
    down = level**2 * _inverse_level(step.path, step.t)
    up = math.sqrt(level**2 - down**2)
    out = step.out
    a, b = alpha * (out.x0_x + down * out.eps_x), alpha * (out.x0_f + down * out.eps_f)
    return Update(a, b, alpha * up, lands=step.path.time(down))


def dpmpp_2m(step: Step, spec: SamplerSpec) -> Update:
    """DPM-Solver++(2M), Lu et al. 2022 (arXiv 2211.01095), midpoint; its first and last steps are of first order."""
    out, keep = step.out, (step.out.x0_x, step.out.x0_f)
    alpha, sigma = step.land()
    here = _inverse_level(step.path, step.t)
    shrink = 0.0 if step.to is None else step.path.level(step.to) * here  # exp(-h), h the step in log(alpha / sigma)
    ratio, gain = sigma / step.path.sigma(step.t), alpha * (1.0 - shrink)
    if step.before is None or step.last or step.to is None:
        return Update(ratio + gain * out.x0_x, gain * out.x0_f, 0.0, keep=None if step.last else keep, lands=step.to)
    before = _inverse_level(step.path, step.before)  # 0 at pure noise: infinitely far, so its estimate has no weight
    lean = 0.5 * math.log(shrink) / math.log(before / here) if before else 0.0
    a, b = ratio + gain * (1 + lean) * out.x0_x, gain * (1 + lean) * out.x0_f
    return Update(a, b, 0.0, -gain * lean, keep, step.to)


def _inverse_level(path: Path, t: float) -> float:
    """alpha / sigma: finite at pure noise, where the level is not."""
    return path.alpha(t) / path.sigma(t)


def tcd(step: Step, spec: SamplerSpec) -> Update:
    """Strategic stochastic sampling (Zheng et al. 2024): hop below `to` by gamma, then noise back up to it."""
    gamma = spec.gamma or 0.0
    alpha, sigma = step.land()
    if step.to is None:
        return ddim(step, spec)
    below = (1.0 - gamma) * step.to
    below = float(math.floor(below)) if step.path.kind == "vp" else below
    alpha_u, sigma_u = step.path.alpha(below), step.path.sigma(below)
    ratio = alpha / alpha_u
    a = ratio * (alpha_u * step.out.x0_x + sigma_u * step.out.eps_x)
    b = ratio * (alpha_u * step.out.x0_f + sigma_u * step.out.eps_f)
    c = 0.0 if step.last else math.sqrt(max(0.0, sigma**2 - (ratio * sigma_u) ** 2))
    return Update(a, b, c, lands=below)


def trig(step: Step, spec: SamplerSpec) -> Update:
    """sCM on TrigFlow (Lu & Song 2024): denoise, then fresh noise at `to`: `cos t' x0 + sin t' sigma_data z`."""
    alpha, sigma = (1.0, 0.0) if step.last else step.land()
    return Update(alpha * step.out.x0_x, alpha * step.out.x0_f, sigma)


def edm(step: Step, spec: SamplerSpec) -> Update:
    """Consistency models (Song et al. 2023): `x0 + sqrt(t'^2 - sigma_min^2) z`."""
    floor = step.path.end
    noise = 0.0 if step.last or step.to is None else math.sqrt(max(0.0, step.to**2 - floor**2))
    return Update(step.out.x0_x, step.out.x0_f, noise, lands=floor)


SAMPLERS: dict[str, Callable[[Step, SamplerSpec], Update]] = {
    "ddim": ddim,
    "euler": ddim,
    "euler-ancestral": euler_ancestral,
    "dpmpp-2m": dpmpp_2m,
    "phased": ddim,
    "lcm": lcm,
    "tcd": tcd,
    "trig": trig,
    "edm": edm,
}


def time_pairs(spec: SamplerSpec, steps: int) -> list[tuple[float, float | None]]:
    """(t, where the step lands) for each step; None lands on clean data."""
    end = None if spec.final_alpha_one else spec.path.end
    if steps in spec.grids:
        grid = spec.grids[steps]
        return list(zip(grid, [*grid[1:], end], strict=True))
    if spec.spacing is None:
        raise ValueError(f"no grid of {steps} steps")
    total = int(spec.path.start) + 1
    stride = total // steps
    if spec.spacing.kind == "trailing":
        step = (total - total / steps) - total  # as numpy's arange steps, so that ties round as they do in diffusers
        times = [round(total + k * step) - 1 for k in range(steps)]
    else:
        times = [k * stride + spec.spacing.offset for k in reversed(range(steps))]
    # diffusers' DDIM lands `total // steps` below each time, whatever the next time is
    landings = [t - stride for t in times]
    return [(float(t), float(to) if to >= 0 else end) for t, to in zip(times, landings, strict=True)]


def updates(spec: SamplerSpec, steps: int) -> list[tuple[float, Update]]:
    """(t, coefficients) of each step of the spec's sampler."""
    rule = SAMPLERS[spec.sampler]
    pairs = time_pairs(spec, steps)
    out = []
    for k, (t, to) in enumerate(pairs):
        last = k == len(pairs) - 1
        before = pairs[k - 1][0] if k else None
        out.append((t, rule(Step(t, to, last, spec.path, estimates(spec.prediction, spec.path, t), before), spec)))
    return out


def start_scale(spec: SamplerSpec, t: float) -> float:
    """What standard noise is multiplied by to begin at time t: the path's rule, or sigma where `spec.start` says so."""
    return float(spec.path.sigma(t)) if spec.start == "sigma" else path_start(spec.path)


def path_start(path: Path) -> float:
    """Sigma at the start for EDM and TrigFlow, else 1, as diffusers."""
    return float(path.sigma(path.start)) if path.kind in ("edm", "trig") else 1.0
