"""A request and a spec become a plan: a few rows of numbers that say everything about its sampling. Pure, no torch.

A row is one network evaluation (two under classifier-free guidance) and one affine update. Rows of different plans may
share an engine call and an update, whatever their samplers, step counts and step indices.
"""

from dataclasses import dataclass, replace

from fewstep.models.spec import SamplerSpec

from .request import GenerateRequest
from .samplers import start_scale, updates


@dataclass(frozen=True)
class Row:
    """One step of one picture: evaluate at time t, then `x <- a x + b F + c z + d m`.

    m is the clean estimate that the step before left; `keep` says how this one leaves its own: `keep[0] x + keep[1] F`,
    None where the next step asks for none.
    `w` is the guidance scale; `pair` says whether it needs the unconditional evaluation too (then F = u + w (c - u)),
    otherwise w goes to the network if the network takes it. `control` is the residuals' scale, 0 for none.
    """

    index: int
    t: float
    a: float
    b: float
    c: float
    w: float
    pair: bool
    control: float
    d: float = 0.0
    keep: tuple[float, float] | None = None

    @property
    def evaluations(self) -> int:
        return 2 if self.pair else 1


@dataclass(frozen=True)
class Plan:
    """All rows of one picture, and the scale of the noise they begin with."""

    rows: tuple[Row, ...]
    start_scale: float

    @property
    def nfe(self) -> int:
        """Network evaluations of the denoiser, guidance included."""
        return sum(row.evaluations for row in self.rows)


def compile_plan(request: GenerateRequest, spec: SamplerSpec) -> Plan:
    """Rows of one picture of a resolved request (`runtime.request.resolve`)."""
    if request.steps is None or request.guidance is None:
        raise ValueError("compile_plan takes a resolved request")
    if request.gamma is not None:
        spec = replace(spec, gamma=request.gamma, stochastic=request.gamma != 0.0)
    pair = spec.guidance.mode == "cfg" and request.guidance != 1.0
    rows = []
    for k, (t, update) in enumerate(updates(spec, request.steps)):
        rows.append(
            Row(
                index=k,
                t=t,
                a=update.a,
                b=update.b,
                c=update.c,
                w=request.guidance,
                pair=pair,
                control=_control_scale(request, k, request.steps),
                d=update.d,
                keep=update.keep,
            )
        )
    return Plan(tuple(rows), start_scale(spec, rows[0].t))


def _control_scale(request: GenerateRequest, k: int, steps: int) -> float:
    """Residuals are on while step k of N lies inside [start, end], by diffusers' rule."""
    control = request.control
    if control is None or k / steps < control.start or (k + 1) / steps > control.end:
        return 0.0
    return control.scale
