"""A request and a spec become a plan: a few rows of numbers that say everything about its sampling. Pure, no torch.

A row is one network evaluation (two under classifier-free guidance) and one affine update. Rows of different plans may
share an engine call and an update, whatever their samplers, step counts and step indices. Methods are changes of a
plan (`runtime.sampling.plan_methods`) wherever the algebra allows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from fewstep.models.paths import Path, told_time
from fewstep.models.predictions import estimates
from fewstep.models.roles import (
    DENOISER,
    DENOISER_CONTROL,
    DENOISER_IMAGE_PROMPT,
    DENOISER_LORA,
    DENOISER_NEGATIVE,
)
from fewstep.models.spec import SamplerSpec

from .request import GenerateRequest
from .samplers import SAMPLERS, Step, Update, start_scale, time_pairs


@dataclass(frozen=True, kw_only=True)
class Residual:
    """Guidance against a kept estimate e of the unconditional noise (StreamDiffusion, Kodaira et al. 2023).

    The guided noise estimate is `delta e + w (eps - delta e)`; after the update e becomes
    `(x_next + slope (sigma e - x)) / sigma_next`, the noise that would have led here from the same clean sample.
    ask: e is this row's own unconditional output, by a second evaluation.
    """

    delta: float
    sigma: float
    slope: float
    sigma_next: float
    ask: bool = False


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What a row does beside its affine update.

    clip: bound on the clean estimate x0; quantile: see `GenerateRequest`. restore: what of x0's picture becomes the
    request's, "grey" or "coarse". known: (signal, noise) of the request's picture where its mask keeps it, after the
    update. residual: guidance against a kept estimate. aside: its noise comes from a stream of its own, so that other
    rows draw what they would without it.
    """

    clip: float | None = None
    quantile: float | None = None
    restore: str | None = None
    known: tuple[float, float] | None = None
    residual: Residual | None = None
    aside: bool = False


@dataclass(frozen=True)
class Row:
    """One step of one picture: evaluate at time t, then `x <- a x + b F + c z + d m`.

    m is the combination that an earlier row kept; `keep` says how this one leaves its own: `keep[0] x + keep[1] F` (the
    clean estimate, for multistep solvers), None where the next step asks for none.
    `s` is where the step lands, for networks that take a second time. `w` is the guidance scale; `pair` says whether it
    needs the unconditional evaluation too (then F = u + w (c - u)), otherwise w goes to the network if the network
    takes it. Scales of what steers the network, 0 for none: `control` (residuals or features), `negative` (the negative
    prompt in the attention), `image` (the picture prompt) and `loras`, (name, weight) each. model: the served model
    that evaluates it, None for the request's own.
    """

    index: int
    t: float
    s: float
    a: float
    b: float
    c: float
    w: float
    pair: bool
    control: float
    d: float = 0.0
    keep: tuple[float, float] | None = None
    model: str | None = None
    negative: float = 0.0
    image: float = 0.0
    loras: tuple[tuple[str, float], ...] = ()
    hooks: Hooks | None = None

    @property
    def evaluations(self) -> int:
        return 2 if self.pair else 1

    @property
    def role(self) -> str:
        """The denoiser's graph that it needs; an adapter's counts as control."""
        if self.control:
            return DENOISER_CONTROL
        if self.negative:
            return DENOISER_NEGATIVE
        if self.image:
            return DENOISER_IMAGE_PROMPT
        return DENOISER_LORA if self.loras else DENOISER


@dataclass(frozen=True)
class Plan:
    """All rows of one picture. It begins as `start_signal z0 + start_scale n`: n standard noise, z0 the latent of the
    request's own picture."""

    rows: tuple[Row, ...]
    start_scale: float
    start_signal: float = 0.0

    @property
    def nfe(self) -> int:
        """Network evaluations of the denoiser, guidance included."""
        return sum(row.evaluations for row in self.rows)

    @cached_property
    def models(self) -> tuple[str, ...]:
        """The other models that evaluate rows of it."""
        return tuple(dict.fromkeys(row.model for row in self.rows if row.model is not None))

    @cached_property
    def avoiding(self) -> frozenset[str | None]:
        """The models (None: the request's own) some of whose rows are led away from a text."""
        return frozenset(row.model for row in self.rows if row.pair or row.negative)


def compile_plan(request: GenerateRequest, spec: SamplerSpec, others: Mapping[str, SamplerSpec] | None = None) -> Plan:
    """Rows of one picture of a resolved request (`runtime.sampling.request.resolve`). others: specs of served models by
    name, for requests in which a second one takes part."""
    if request.steps is None or request.guidance is None:
        raise ValueError("compile_plan takes a resolved request")
    if request.gamma is not None:
        spec = replace(spec, gamma=request.gamma, stochastic=request.gamma != 0.0)
    if _is_plain(request):
        return _plain(request, spec, chain(spec, time_pairs(spec, request.steps)))
    from .plan_methods import compile_methods

    return compile_methods(request, spec, others or {})


def chain(spec: SamplerSpec, pairs: Sequence[tuple[float, float | None]]) -> list[Step]:
    """Steps from (t, where it lands) each."""
    befores = [None, *(t for t, _ in pairs)]
    return [
        Step(t, to, k == len(pairs) - 1, spec.path, estimates(spec.prediction, spec.path, t), befores[k])
        for k, (t, to) in enumerate(pairs)
    ]


def row_of(request: GenerateRequest, spec: SamplerSpec, index: int, steps: int, t: float, update: Update) -> Row:
    """The row of step `index` of `steps`, under the request's guidance and control."""
    assert request.guidance is not None
    w = request.guidance if request.guidance_ramp is None else ramped(request.guidance, request.guidance_ramp, spec, t)
    return Row(
        index=index,
        t=t,
        s=told_time(spec.path, update.lands),
        a=update.a,
        b=update.b,
        c=update.c,
        w=w,
        pair=spec.guidance.mode == "cfg" and w != 1.0,
        control=_control_scale(request, index, steps),
        d=update.d,
        keep=update.keep,
    )


def ramped(w: float, ramp: tuple[float, float], spec: SamplerSpec, t: float) -> float:
    """Dynamic guidance (iCD, Starodubcev et al. 2024): w below tau1, 1 above tau2, on a line between."""
    low, high = ramp
    tau = t / span(spec.path)
    if tau <= low:
        return w
    return 1.0 if tau >= high else 1.0 + (w - 1.0) * (high - tau) / (high - low)


def span(path: Path) -> float:
    """The native time that counts as t / 1000 = 1."""
    return float(getattr(path, "num_train_timesteps", path.start))


def _is_plain(request: GenerateRequest) -> bool:
    return request.times is None and not wants_methods(request)


def wants_methods(request: GenerateRequest) -> bool:
    """Whether a resolved request's rows do more than its sampler's own update under guidance and control."""
    return (
        request.edit is not None
        or request.helper is not None
        or request.clip is not None
        or request.image_prompt is not None
        or request.negative_mode is not None
        or request.residual is not None
        or request.noise_correction
        or bool(request.loras)
    )


def _plain(request: GenerateRequest, spec: SamplerSpec, steps: Sequence[Step]) -> Plan:
    rule, count = SAMPLERS[spec.sampler], len(steps)
    rows = tuple(row_of(request, spec, k, count, step.t, rule(step, spec)) for k, step in enumerate(steps))
    return Plan(rows, start_scale(spec, rows[0].t))


def _control_scale(request: GenerateRequest, k: int, steps: int) -> float:
    """Residuals are on in the part of the steps that the request says."""
    control = request.control
    return 0.0 if control is None or not within(k, steps, control.start, control.end) else control.scale


def within(k: int, steps: int, start: float, end: float) -> bool:
    """Whether step k of `steps` lies inside [start, end], by diffusers' rule for ControlNets."""
    return k / steps >= start and (k + 1) / steps <= end
