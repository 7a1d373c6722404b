"""One step of any mix of pictures: one denoiser call for all rows, then one fused update `a x + b F + c z` in float32.

Shapes: a row's latent is [C, ...] without batch, its conditions likewise (ctx [L, D], ...), its edge [3, H, W]. Rows
may come from different requests, samplers, step counts and step indices; a row's result does not depend on others.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fewstep.models.denoiser import expand, guide
from fewstep.models.predictions import estimates
from fewstep.models.spec import SamplerSpec

from .engine import ADAPTER, CONTROLNET, DENOISER, DENOISER_ADAPTER, DENOISER_CONTROL, Engine
from .errors import EngineFailed
from .plan import Row
from .rng import NoiseStream

T = TypeVar("T")

Conditions = Mapping[str, Tensor]
"""Named inputs of the denoiser beside x, t, w and residuals, without batch; the same names in every row of a call."""


@dataclass
class History:
    """What a multistep solver keeps of a picture's last step: its clean estimate [C, ...]."""

    estimate: Tensor | None = None


@dataclass
class Features:
    """What a T2I-Adapter made of a request's picture, once it has: feature maps [C, h, w] of several sizes."""

    maps: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class RowState:
    """Everything one row's step needs. `uncond` is needed where `row.pair`, `edge` where `row.control` is not 0 (with
    `kind`, its place among the spec's `control_kinds`, where there are any), `history` where the row keeps or reads an
    estimate. `features` keeps an adapter's answer for the steps that follow."""

    row: Row
    x: Tensor
    cond: Conditions
    noise: NoiseStream
    uncond: Conditions | None = None
    edge: Tensor | None = None
    history: History | None = None
    kind: int | None = None
    features: Features | None = None


@torch.inference_mode()
def advance(engine: Engine, states: Sequence[RowState], spec: SamplerSpec) -> list[Tensor | EngineFailed]:
    """Each row's next latent, or `EngineFailed` for a row whose network output is not finite.

    Noise is drawn from a row's own stream, after the engine call and only where the row is stochastic, so a call that
    raises may be repeated.

    Errors: whatever the engine raises.
    """
    x = torch.stack([state.x for state in states])
    f = evaluate(engine, states, x)
    if spec.clip is not None:
        f = _clip(x, f, states, spec)
    finite = finite_rows(f)
    rows = [state.row for state in states]
    numbers = torch.tensor([(row.a, row.b, row.c) for row in rows], dtype=torch.float32, device=x.device)
    a, b, c = (column.reshape(-1, *([1] * (x.ndim - 1))) for column in numbers.unbind(1))
    out = torch.addcmul(a * x, b, f)
    if any(row.c for row in rows):
        z = torch.stack([_noise(state) for state in states])
        out = torch.addcmul(out, c, z.to(x.device))
    out = _remember(states, x, f, out)
    return [
        latent if ok else EngineFailed(f"engine {engine.name} gave a non-finite output at step {row.index + 1}")
        for latent, ok, row in zip(out.unbind(), finite, rows, strict=True)
    ]


def evaluate(engine: Engine, states: Sequence[RowState], x: Tensor) -> Tensor:
    """Guided raw outputs F, [B, C, ...]. A row under classifier-free guidance is two rows of the one engine call."""
    rows = [state.row for state in states]
    pairs = [i for i, row in enumerate(rows) if row.pair]
    order = [*range(len(rows)), *pairs]
    conds = [state.cond for state in states] + [_present(states[i].uncond, "uncond", rows[i]) for i in pairs]
    feeds = {
        "x": torch.cat([x, x[pairs]]) if pairs else x,
        "t": _vector([rows[i].t for i in order], x),
        **{name: torch.stack([cond[name] for cond in conds]) for name in conds[0]},
    }
    role, steering = _steering(engine, states, order, feeds)
    if engine.capabilities.takes_w:
        feeds["w"] = _vector([rows[i].w for i in order], x)
    (out,) = run_batch(engine, role, {**feeds, **steering})
    if not pairs:
        return out
    f = out[: len(rows)].clone()
    f[pairs] = guide(out[len(rows) :], f[pairs], _vector([rows[i].w for i in pairs], x))
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
    engine: Engine, states: Sequence[RowState], order: list[int], feeds: Mapping[str, Tensor]
) -> tuple[str, dict[str, Tensor]]:
    """The denoiser's role in this call, and its inputs beside `feeds`: zero in rows without control."""
    steered = [k for k, i in enumerate(order) if states[i].row.control]
    if not steered:
        return DENOISER, {}
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
    feeds["edge"] = torch.stack([_present(state.edge, "edge", state.row) for state in states])
    feeds["scale"] = _vector([state.row.control for state in states], feeds["x"])
    if states[0].kind is not None:
        kinds = [_present(state.kind, "kind", state.row) for state in states]
        feeds["kind"] = torch.tensor(kinds, dtype=torch.int64, device=feeds["x"].device)
    return run_batch(engine, CONTROLNET, feeds)


def _features(engine: Engine, states: Sequence[RowState], x: Tensor) -> tuple[Tensor, ...]:
    """An adapter's feature maps [B, C, h, w] of rows under control, times their scale; each picture is read once."""
    held = [state.features or Features() for state in states]
    fresh = {id(kept): k for k, kept in enumerate(held) if not kept.maps}.values()
    if fresh:
        edges = torch.stack([_present(states[k].edge, "edge", states[k].row) for k in fresh])
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
        history = _present(state.history, "history", row)
        if row.d:
            out[k] += row.d * _present(history.estimate, "the estimate of the step before", row)
        history.estimate = None if row.keep is None else row.keep[0] * x[k] + row.keep[1] * f[k]
    return out


def _clip(x: Tensor, f: Tensor, states: Sequence[RowState], spec: SamplerSpec) -> Tensor:
    """F changed so that its clean estimate lies within `spec.clip`; the noise estimate follows the clipped one."""
    bound = spec.clip
    out = estimates(spec.prediction, spec.path, torch.tensor([s.row.t for s in states], dtype=torch.float64))
    x0 = expand(out.x0_x, x) * x + expand(out.x0_f, x) * f
    clipped = (x0.clamp(-bound, bound) - expand(out.x0_x, x) * x) / expand(out.x0_f, x)  # type: ignore[operator]
    return torch.where(x0 == x0.clamp(-bound, bound), f, clipped)  # type: ignore[operator]


def _noise(state: RowState) -> Tensor:
    if state.row.c:
        return state.noise.draw(tuple(state.x.shape))
    return torch.zeros(state.x.shape)


def _present(value: T | None, name: str, row: Row) -> T:
    if value is None:
        raise ValueError(f"row {row.index} needs {name}")
    return value


def _vector(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)


def _column(values: list[float], x: Tensor) -> Tensor:
    return _vector(values, x).reshape(-1, *([1] * (x.ndim - 1)))
