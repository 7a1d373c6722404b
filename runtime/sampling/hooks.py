"""What rows do beside their affine update: hooks on F before it, and on the latent after it (`plan.Hooks`).

Every hook acts on its own row alone, so rows with and without hooks share calls.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from fewstep.models.predictions import Affine, estimates
from fewstep.models.spec import SamplerSpec

from ..engine import DECODER, ENCODER
from .edits import restored
from .plan import Residual, Row

if TYPE_CHECKING:
    from .step import RowState

T = TypeVar("T")

Run = Callable[[str, Mapping[str, Tensor]], tuple[Tensor, ...]]
"""An engine's `run` for any number of rows."""


def before_update(run: Run, states: Sequence["RowState"], x: Tensor, f: Tensor, spec: SamplerSpec) -> Tensor:
    """F [B, C, ...] after the hooks on it: guidance by residuals, clipping, what the row's picture must keep."""
    f = f.clone()
    restoring = []
    for k, state in enumerate(states):
        hooks = state.row.hooks
        if hooks is None:
            continue
        out = estimates(spec.prediction, spec.path, state.row.t)
        if hooks.residual is not None:
            f[k] = _guided_by_residual(state, hooks.residual, x[k], f[k], out)
        if hooks.clip is not None:
            f[k] = _clipped(x[k], f[k], out, hooks.clip, hooks.quantile)
        if hooks.restore is not None:
            restoring.append(k)
    return _restored(run, states, restoring, x, f, spec) if restoring else f


def after_update(states: Sequence["RowState"], x: Tensor, out: Tensor) -> Tensor:
    """The new latents [B, C, ...] with each request's own picture where its mask keeps it; residuals are renewed."""
    out = out.clone()
    for k, state in enumerate(states):
        hooks = state.row.hooks
        if hooks is None:
            continue
        if hooks.residual is not None and hooks.residual.sigma_next:
            _renew(state, hooks.residual, x[k], out[k])
        if hooks.known is not None:
            signal, noise = hooks.known
            source, start = present(state.source, "source"), present(state.start, "start")
            latent, mask = present(source.latent, "the latent of its picture"), present(source.mask, "mask")
            out[k] = mask * out[k] + (1.0 - mask) * (signal * latent + noise * start)
    return out


def _clipped(x: Tensor, f: Tensor, out: Affine, bound: float, quantile: float | None) -> Tensor:
    """F changed so that its clean estimate lies within the bound; the noise estimate follows the clipped one.

    With a quantile the bound grows to that of |x0|, and x0 is scaled back (dynamic thresholding, Saharia et al. 2022).
    A row within the bound stays as it is.
    """
    x0 = out.x0_x * x + out.x0_f * f
    limit = torch.tensor(bound, dtype=x0.dtype, device=x0.device)
    if quantile is not None:
        limit = torch.quantile(x0.abs().flatten(), quantile).clamp(min=bound)
    wanted = x0.clamp(-limit, limit) * (bound / limit)
    return torch.where(x0 == wanted, f, (wanted - out.x0_x * x) / out.x0_f)


def _guided_by_residual(state: "RowState", residual: Residual, x: Tensor, f: Tensor, out: Affine) -> Tensor:
    """F of the noise estimate `delta e + w (eps - delta e)`."""
    history = present(state.history, "history")
    if residual.ask:
        history.residual = out.eps_x * x + out.eps_f * present(history.unconditional, "its unconditional output")
    elif history.residual is None:
        history.residual = present(state.start, "start")
    kept: Tensor = (residual.delta * history.residual - out.eps_x * x) / out.eps_f
    return kept + state.row.w * (f - kept)


def _renew(state: "RowState", residual: Residual, x: Tensor, out: Tensor) -> None:
    """e after the update: the noise at the next time that starts from the same clean sample."""
    history = present(state.history, "history")
    kept = residual.sigma * present(history.residual, "its residual")
    history.residual = (out + residual.slope * (kept - x)) / residual.sigma_next


def _restored(
    run: Run, states: Sequence["RowState"], rows: list[int], x: Tensor, f: Tensor, spec: SamplerSpec
) -> Tensor:
    """F whose clean estimate shows what the rows' pictures must keep.

    That is said of pixels, so the estimate goes through the decoder and comes back through the encoder.
    """
    outs = [estimates(spec.prediction, spec.path, states[k].row.t) for k in rows]
    x0 = torch.stack([out.x0_x * x[k] + out.x0_f * f[k] for k, out in zip(rows, outs, strict=True)])
    (made,) = run(DECODER, {"latent": x0})
    sources = torch.stack([present(present(states[k].source, "source").picture, "its picture") for k in rows])
    keeps = [hooks.restore for k in rows if (hooks := states[k].row.hooks) and hooks.restore]
    (latents,) = run(ENCODER, {"picture": restored(made, sources, keeps)})
    for k, out, latent in zip(rows, outs, latents, strict=True):
        f[k] = (latent - out.x0_x * x[k]) / out.x0_f
    return f


def present(value: T | None, name: str, row: Row | None = None) -> T:
    """The value.

    Errors: `ValueError` where it is None, which is a mistake of ours.
    """
    if value is None:
        raise ValueError(f"{'a request' if row is None else f'row {row.index}'} needs {name}")
    return value
