"""Methods as changes of a plan: other times, other coefficients, rows of other models, and hooks. Pure, no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fewstep.models.paths import told_time
from fewstep.models.predictions import Affine, estimates
from fewstep.models.spec import SamplerSpec

from .plan import Hooks, Plan, Residual, Row, chain, row_of, within
from .request import GenerateRequest, Helper
from .samplers import SAMPLERS, Step, Update, ddim, start_scale, time_pairs

Pairs = list[tuple[float, float | None]]


def compile_methods(request: GenerateRequest, spec: SamplerSpec, others: Mapping[str, SamplerSpec]) -> Plan:
    """The plan of a resolved request with methods."""
    pairs = grid(request, spec)
    edit, helper = request.edit, request.helper
    if edit is not None:
        pairs = remaining(pairs, spec, edit.strength)
    steps = chain(spec, pairs)
    from_noise = edit is None or (edit.strength == 1.0 and request.invert is None)
    if request.noise_correction:
        steps[0] = replace(steps[0], out=true_noise(steps[0].out, start_scale(spec, steps[0].t)))
    updates = [SAMPLERS[spec.sampler](step, spec) for step in steps]
    rows = [row_of(request, spec, k, len(steps), s.t, u) for k, (s, u) in enumerate(zip(steps, updates, strict=True))]
    rows = [_steered(row, request, len(rows)) for row in rows]
    rows = [_hooked(row, step, request) for row, step in zip(rows, steps, strict=True)]
    if helper is not None and helper.mode == "first":
        rows[0] = _by_helper(rows[0], steps[0], helper, others[helper.model])
    if helper is not None and helper.mode == "pull" and helper.weight:
        rows = _pulled(rows, steps[0], spec, helper, others[helper.model])
    start = spec.path, steps[0].t
    if request.invert is not None:
        before = inverse_rows(request.invert, others[request.invert], spec, steps[0].t)
        rows, start = [*before, *rows], (spec.path, before[0].t) if before else start
    rows = [replace(row, index=k) for k, row in enumerate(rows)]
    if from_noise:
        return Plan(tuple(rows), start_scale(spec, start[1]))
    path, t = start
    return Plan(tuple(rows), path.sigma(t), path.alpha(t))


def grid(request: GenerateRequest, spec: SamplerSpec) -> Pairs:
    """(t, where the step lands) of the request's own times, or else of the spec's grid.

    TDD (Wang et al. 2024) takes grids of uneven steps; the sampler's update is the same on any.
    """
    if request.times is None:
        assert request.steps is not None
        return time_pairs(spec, request.steps)
    end = None if spec.final_alpha_one else spec.path.end
    return list(zip(request.times, [*request.times[1:], end], strict=True))


def remaining(pairs: Pairs, spec: SamplerSpec, strength: float) -> Pairs:
    """The steps of a picture that begins from another (SDEdit, Meng et al. 2022): never none of them.

    Where the spec has `origin_steps` and a grid of its own, as many times again are taken from the lowest `strength` of
    those that the student was trained on (LCM, TCD). Else the first steps are left out: of N steps int(strength N) are
    kept on VP paths, N - int(N - strength N) on others, as diffusers' pipelines count.
    """
    count = len(pairs)
    if strength == 1.0:
        return pairs
    if spec.origin_steps is not None and [t for t, _ in pairs] == list(spec.grids.get(count, ())):
        return _rescaled(count, spec, strength)
    kept = int(count * strength) if spec.path.kind == "vp" else count - int(count - count * strength)
    return pairs[count - max(1, kept) :]


def _rescaled(count: int, spec: SamplerSpec, strength: float) -> Pairs:
    """As diffusers' LCM and TCD schedulers: `count` times spread over the lowest of the training times."""
    origin = spec.origin_steps or 0
    stride = (int(spec.path.start) + 1) // origin
    lowest = max(1, int(origin * strength))
    falling = [k * stride - 1 for k in range(lowest, 0, -1)]
    count = min(count, lowest)
    times = [float(falling[k * lowest // count]) for k in range(count)]
    return list(zip(times, [*times[1:], None if spec.final_alpha_one else spec.path.end], strict=True))


def true_noise(out: Affine, scale: float) -> Affine:
    """Noise correction (Imagine Flash, Kohler et al. 2024): at pure noise x is the noise itself, so the direction of
    the first step is x over its scale, not the network's estimate."""
    return replace(out, eps_x=1.0 / scale, eps_f=0.0)


def inverse_rows(name: str, inverse: SamplerSpec, spec: SamplerSpec, to: float) -> list[Row]:
    """Rows that take a picture up to time `to` by an inverse student (iCD, Starodubcev et al. 2024), without guidance.

    Its grid, read upwards: each of its times below `to` is a hop to the next, deterministic as the way back.
    """
    longest = max(inverse.grids)
    times = sorted(t for t in inverse.grids[longest] if t < to)
    rows = []
    for t, up in zip(times, [*times[1:], to], strict=True):
        out = estimates(inverse.prediction, inverse.path, t)
        update = ddim(Step(t, up, False, spec.path, out), inverse)
        rows.append(_row(inverse, t, update, 1.0, False, name))
    return rows


def _row(spec: SamplerSpec, t: float, update: Update, w: float, pair: bool, model: str) -> Row:
    """A row of another model, of this spec."""
    s = told_time(spec.path, update.lands)
    return Row(0, t, s, update.a, update.b, update.c, w, pair, 0.0, model=model)


def _by_helper(row: Row, step: Step, helper: Helper, other: SamplerSpec) -> Row:
    """Diversity distillation (Gandikota & Bau 2025): the first step is the base model's, along its own ODE."""
    out = estimates(other.prediction, other.path, step.t)
    update = ddim(replace(step, out=out), other)
    w, pair = _guided(helper, other)
    return replace(_row(other, step.t, update, w, pair, helper.model), hooks=_clipped(row.hooks, other))


def _pulled(rows: Sequence[Row], step: Step, spec: SamplerSpec, helper: Helper, other: SamplerSpec) -> list[Row]:
    """Distillation++ (Park et al. 2025): x0 of the first step becomes `(1 - lam) x0 + lam x0_teacher`, the teacher's
    estimate made at the next time from x0 with noise of its own.

    The student's row keeps its own update with x0 scaled by 1 - lam and leaves `a_u x0 + s_u n` for the teacher's row,
    which adds to what was kept the update's share of its own x0.
    """
    first, out, rule = rows[0], step.out, SAMPLERS[spec.sampler]
    lam = helper.weight or 0.0
    assert step.to is not None
    alpha, sigma = step.path.alpha(step.to), step.path.sigma(step.to)
    own = rule(replace(step, out=Affine((1 - lam) * out.x0_x, (1 - lam) * out.x0_f, out.eps_x, out.eps_f)), spec)
    share = rule(replace(step, out=Affine(0.0, 1.0, 0.0, 0.0)), spec).b  # the update is linear in x0
    hooks = first.hooks or Hooks()
    student = replace(
        first, a=alpha * out.x0_x, b=alpha * out.x0_f, c=sigma, keep=(own.a, own.b),
        hooks=replace(hooks, aside=True, known=None),
    )  # fmt: skip
    w, pair = _guided(helper, other)
    theirs = estimates(other.prediction, other.path, step.to)
    update = Update(lam * share * theirs.x0_x, lam * share * theirs.x0_f, first.c, 1.0)
    teacher = replace(_row(other, step.to, update, w, pair, helper.model), d=1.0)
    teacher = replace(teacher, hooks=_clipped(replace(hooks, restore=None), other))
    return [student, teacher, *rows[1:]]


def _clipped(hooks: Hooks | None, other: SamplerSpec) -> Hooks | None:
    """Another model's row has that model's bound where the request states none."""
    found = hooks or Hooks()
    found = replace(found, clip=other.clip if found.clip is None else found.clip)
    return None if found == Hooks() else found


def _guided(helper: Helper, other: SamplerSpec) -> tuple[float, bool]:
    w = other.guidance.default if helper.guidance is None else helper.guidance
    return w, other.guidance.mode == "cfg" and w != 1.0


def _steered(row: Row, request: GenerateRequest, steps: int) -> Row:
    """Inputs of the network's inside; a scale of 0 needs none of them."""
    image = 0.0 if request.image_prompt is None else float(request.image_prompt.scale)
    negative = 0.0 if request.negative_mode is None else float(request.negative_scale or 0.0)
    acting = [lora for lora in request.loras if lora.weight and within(row.index, steps, lora.start, lora.end)]
    loras = tuple((lora.name, lora.weight) for lora in acting)
    return replace(row, image=image, negative=negative, loras=loras) if image or negative or loras else row


def _hooked(row: Row, step: Step, request: GenerateRequest) -> Row:
    edit = request.edit
    known = None if edit is None or edit.mask is None else (1.0, 0.0) if step.last else step.land()
    residual = None if request.residual is None else _residual(row, step, request)
    hooks = Hooks(
        clip=request.clip, quantile=request.clip_quantile, restore=None if edit is None else edit.keep,
        known=known, residual=residual,
    )  # fmt: skip
    pair = row.pair if residual is None else residual.ask
    return row if hooks == Hooks() else replace(row, hooks=hooks, pair=pair)


def _residual(row: Row, step: Step, request: GenerateRequest) -> Residual | None:
    if not row.pair:
        return None
    out, (_, sigma_next) = step.out, step.land()
    return Residual(
        delta=1.0 if request.residual_delta is None else request.residual_delta,
        sigma=step.path.sigma(step.t),
        slope=row.a - row.b * out.eps_x / out.eps_f,  # of x, where F is written by eps
        sigma_next=sigma_next,
        ask=request.residual == "onetime" and row.index == 0,
    )
