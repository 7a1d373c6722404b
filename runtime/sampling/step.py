"""One step of any mix of pictures: one denoiser call for all rows, then one fused update `a x + b F + c z` in float32.

Shapes: a row's latent is [C, ...] without batch, its conditions likewise (ctx [L, D], ...), its edge [3, H, W]. Rows
may come from different requests, samplers, step counts and step indices; a row's result does not depend on others.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from fewstep.models.denoiser import guide
from fewstep.models.roles import DENOISER_LORA, DENOISER_NEGATIVE
from fewstep.models.spec import SamplerSpec

from ..engine import ADAPTER, CONTROLNET, DENOISER, DENOISER_ADAPTER, DENOISER_CONTROL, Engine
from ..errors import EngineFailed
from .edits import Source
from .hooks import after_update, before_update, present
from .plan import Row
from .rng import NoiseStream

T = TypeVar("T")

Conditions = Mapping[str, Tensor]
"""Named inputs of the denoiser beside x, t, w and residuals, without batch; the same names in every row of a call."""


@dataclass
class History:
    """What rows of a picture leave for later ones, [C, ...] each: the combination that `Row.keep` says, the residual of
    guidance without a second evaluation, and the unconditional output that it begins with."""

    estimate: Tensor | None = None
    residual: Tensor | None = None
    unconditional: Tensor | None = None


@dataclass
class Features:
    """What a T2I-Adapter made of a request's picture, once it has: feature maps [C, h, w] of several sizes."""

    maps: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class RowState:
    """Everything one row's step needs. `uncond` is needed where `row.pair`, `edge` where `row.control` is not 0 (with
    `kind`, its place among the spec's `control_kinds`, where there are any), `history` where the row keeps or reads an
    estimate. `features` keeps an adapter's answer for the steps that follow. `source`: the request's own picture or
    picture prompt. `start`: the noise that the picture began with, where hooks read it. `avoid`: the conditions of the
    negative prompt where `row.negative` is not 0. `loras`: the weight of each LoRA that the engine mixes."""

    row: Row
    x: Tensor
    cond: Conditions
    noise: NoiseStream
    uncond: Conditions | None = None
    edge: Tensor | None = None
    history: History | None = None
    kind: int | None = None
    features: Features | None = None
    source: Source | None = None
    start: Tensor | None = None
    avoid: Conditions | None = None
    loras: tuple[float, ...] = ()


@torch.inference_mode()
def advance(engine: Engine, states: Sequence[RowState], spec: SamplerSpec) -> list[Tensor | EngineFailed]:
    """Each row's next latent, or `EngineFailed` for a row whose network output is not finite.

    Noise is drawn from a row's own stream, after the engine call and only where the row is stochastic, so a call that
    raises may be repeated.

    Errors: whatever the engine raises.
    """
    x = torch.stack([state.x for state in states])
    f = evaluate(engine, states, x)
    rows = [state.row for state in states]
    hooked = any(row.hooks is not None for row in rows)
    if hooked:
        f = before_update(partial(run_batch, engine), states, x, f, spec)
    finite = finite_rows(f)
    numbers = torch.tensor([(row.a, row.b, row.c) for row in rows], dtype=torch.float32, device=x.device)
    a, b, c = (column.reshape(-1, *([1] * (x.ndim - 1))) for column in numbers.unbind(1))
    out = torch.addcmul(a * x, b, f)
    if any(row.c for row in rows):
        z = torch.stack([_noise(state) for state in states])
        out = torch.addcmul(out, c, z.to(x.device))
    out = _remember(states, x, f, out)
    if hooked:
        out = after_update(states, x, out)
    return [
        latent if ok else EngineFailed(f"engine {engine.name} gave a non-finite output at step {row.index + 1}")
        for latent, ok, row in zip(out.unbind(), finite, rows, strict=True)
    ]


def evaluate(engine: Engine, states: Sequence[RowState], x: Tensor) -> Tensor:
    """Guided raw outputs F, [B, C, ...]. A row under classifier-free guidance is two rows of the one engine call.

    Plain rows join those that are steered in one way; rows steered in several ways take a call for each.
    """
    rows = [state.row for state in states]
    roles = {row.role for row in rows}
    if len(roles) > 1 and len(roles - {DENOISER}) > 1:
        return _evaluate_apart(engine, states, x, sorted(roles))
    pairs = [i for i, row in enumerate(rows) if row.pair]
    order = [*range(len(rows)), *pairs]
    conds = [state.cond for state in states] + [present(states[i].uncond, "uncond", rows[i]) for i in pairs]
    feeds = {
        "x": torch.cat([x, x[pairs]]) if pairs else x,
        "t": _vector([rows[i].t for i in order], x),
        **{name: torch.stack([cond[name] for cond in conds]) for name in conds[0]},
    }
    role, steering = _steering(engine, next(iter(roles - {DENOISER}), DENOISER), states, order, feeds)
    if engine.capabilities.takes_w:
        feeds["w"] = _vector([rows[i].w for i in order], x)
    if engine.capabilities.takes_s:
        feeds["s"] = _vector([rows[i].s for i in order], x)
    (out,) = run_batch(engine, role, {**feeds, **steering})
    if not pairs:
        return out
    f = out[: len(rows)].clone()
    uncond = out[len(rows) :]
    f[pairs] = guide(uncond, f[pairs], _vector([rows[i].w for i in pairs], x))
    for k, i in enumerate(pairs):
        if (hooks := rows[i].hooks) is not None and hooks.residual is not None:
            present(states[i].history, "history", rows[i]).unconditional = uncond[k].clone()
            f[i] = out[i]
    return f


def _evaluate_apart(engine: Engine, states: Sequence[RowState], x: Tensor, roles: Sequence[str]) -> Tensor:
    f = torch.empty_like(x)
    for role in roles:
        own = [k for k, state in enumerate(states) if state.row.role == role]
        f[own] = evaluate(engine, [states[k] for k in own], x[own])
    return f


def finite_rows(x: Tensor) -> list[bool]:
    """Whether each row [B, ...] is finite, in one pass: what is not stays so in a sum."""
    return [math.isfinite(total) for total in x.flatten(1).sum(dim=1, dtype=torch.float32).tolist()]


def run_batch(engine: Engine, role: str, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Run a role on any number of rows: split above the engine's largest batch, padded to a size that it has."""
    able = engine.capabilities
    total = next(iter(feeds.values())).shape[0]
    if total <= able.max_batch and (not able.batch_sizes or total in able.batch_sizes):
        return engine.run(role, feeds)
    parts = []
    for start in range(0, total, able.max_batch):
        part = {name: value[start : start + able.max_batch] for name, value in feeds.items()}
        count = next(iter(part.values())).shape[0]
        size = min((s for s in able.batch_sizes if s >= count), default=count)
        if size > count:
            part = {n: torch.cat([v, v[-1:].expand(size - count, *v.shape[1:])]) for n, v in part.items()}
        parts.append(tuple(out[:count].clone() for out in engine.run(role, part)))  # the engine may reuse its outputs
    return tuple(torch.cat(outs) for outs in zip(*parts, strict=True))


def _steering(
    engine: Engine, wanted: str, states: Sequence[RowState], order: list[int], feeds: Mapping[str, Tensor]
) -> tuple[str, dict[str, Tensor]]:
    """The denoiser's role in this call, and its inputs beside `feeds`: zero, or a scale of 0, in rows without."""
    if wanted == DENOISER:
        return DENOISER, {}
    steered = [k for k, i in enumerate(order) if states[i].row.role == wanted]
    if wanted == DENOISER_CONTROL:
        return _control(engine, steered, states, order, feeds)
    if wanted == DENOISER_LORA:
        count = max(len(states[order[k]].loras) for k in steered)
        weights = [states[i].loras or (0.0,) * count for i in order]
        return wanted, {"lora_scale": torch.tensor(weights, dtype=torch.float32, device=feeds["x"].device)}
    if wanted == DENOISER_NEGATIVE:
        avoided = [present(states[order[k]].avoid, "avoid", states[order[k]].row)["ctx"] for k in steered]
        ctx = feeds["ctx"].clone()
        ctx[steered] = torch.stack(avoided)
        scales = _vector([states[i].row.negative for i in order], feeds["x"])
        return wanted, {"neg_ctx": ctx, "neg_scale": scales}
    return wanted, _image_tokens(steered, states, order, feeds["x"])


def _image_tokens(steered: list[int], states: Sequence[RowState], order: list[int], x: Tensor) -> dict[str, Tensor]:
    """Tokens of picture prompts. The unconditional half of a guided row sees none: its scale is 0."""
    sources = [present(states[order[k]].source, "source", states[order[k]].row) for k in steered]
    found = [present(source.tokens, "image tokens", states[0].row) for source in sources]
    seen = [states[i].row.image if k < len(states) else 0.0 for k, i in enumerate(order)]
    scales = _vector(seen, x)[:, None].expand(-1, sources[0].layers).contiguous()
    return {"img_tok": _spread(torch.stack(found), steered, len(order)), "img_scale": scales}


def _control(
    engine: Engine, steered: list[int], states: Sequence[RowState], order: list[int], feeds: Mapping[str, Tensor]
) -> tuple[str, dict[str, Tensor]]:
    chosen = [states[order[k]] for k in steered]
    if ADAPTER in engine.capabilities.roles:
        role, name, found = DENOISER_ADAPTER, "feature", _features(engine, chosen, feeds["x"])
    else:
        sub = {name: value if len(steered) == len(order) else value[steered] for name, value in feeds.items()}
        role, name, found = DENOISER_CONTROL, "residual", _residuals(engine, chosen, sub)
    if len(steered) < len(order):
        found = tuple(_spread(part, steered, len(order)) for part in found)
    return role, {f"{name}_{k}": part for k, part in enumerate(found)}


def _residuals(engine: Engine, states: Sequence[RowState], feeds: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """ControlNet residuals [B, C, h, w] of rows under control."""
    feeds["edge"] = torch.stack([present(state.edge, "edge", state.row) for state in states])
    feeds["scale"] = _vector([state.row.control for state in states], feeds["x"])
    if states[0].kind is not None:
        kinds = [present(state.kind, "kind", state.row) for state in states]
        feeds["kind"] = torch.tensor(kinds, dtype=torch.int64, device=feeds["x"].device)
    return run_batch(engine, CONTROLNET, feeds)


def _features(engine: Engine, states: Sequence[RowState], x: Tensor) -> tuple[Tensor, ...]:
    """An adapter's feature maps [B, C, h, w] of rows under control, times their scale; each picture is read once."""
    held = [state.features or Features() for state in states]
    fresh = {id(kept): k for k, kept in enumerate(held) if not kept.maps}.values()
    if fresh:
        edges = torch.stack([present(states[k].edge, "edge", states[k].row) for k in fresh])
        found = [out.clone() for out in run_batch(engine, ADAPTER, {"edge": edges})]  # the engine may reuse its outputs
        for k, maps in zip(fresh, zip(*found, strict=True), strict=True):
            held[k].maps = maps
    scales = [state.row.control for state in states]
    stacked = (torch.stack(maps) for maps in zip(*(kept.maps for kept in held), strict=True))
    return tuple(maps * _column(scales, maps) for maps in stacked)


def _spread(part: Tensor, rows: list[int], count: int) -> Tensor:
    """Rows at their places among `count`, zeros elsewhere."""
    whole = part.new_zeros((count, *part.shape[1:]))
    whole[rows] = part
    return whole


def _remember(states: Sequence[RowState], x: Tensor, f: Tensor, out: Tensor) -> Tensor:
    """Multistep rows: add `d m` of the estimate kept before, then keep this step's; others pass untouched."""
    if not any(state.row.d or state.row.keep for state in states):
        return out
    out = out.clone()
    for k, state in enumerate(states):
        row = state.row
        if not (row.d or row.keep):
            continue
        history = present(state.history, "history", row)
        if row.d:
            out[k] += row.d * present(history.estimate, "the estimate of the step before", row)
        history.estimate = None if row.keep is None else row.keep[0] * x[k] + row.keep[1] * f[k]
    return out


def _noise(state: RowState) -> Tensor:
    row = state.row
    if row.c:
        return state.noise.draw(tuple(state.x.shape), aside=row.hooks is not None and row.hooks.aside)
    return torch.zeros(state.x.shape)


def _vector(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)


def _column(values: list[float], x: Tensor) -> Tensor:
    return _vector(values, x).reshape(-1, *([1] * (x.ndim - 1)))
