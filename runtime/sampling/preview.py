"""Pictures of latents without the decoder: one linear map from a latent pixel's channels to red, green and blue.

The map is fitted by least squares to a bundle's own decoder when its golden cases are made, and lies beside them. A
latent is drawn in a fraction of a millisecond, so a step of sampling is not slowed; the picture is as small as the
latent, and rough: it shows where things are and about which colour.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fewstep.models.predictions import estimates
from fewstep.models.spec import SamplerSpec

from ..errors import BundleError
from .events import Picture
from .plan import Plan

if TYPE_CHECKING:
    from fewstep.models.bundle import Bundle

    from ..engine import Engine
    from .inflight import Canvas, Live

FILE, KEY = "preview.safetensors", "weights"
"""In the bundle's folder `golden/`."""
RIDGE = 1e-3
"""Penalty on the map, relative to the latents' mean power: decides between channels that always move together."""
SHIFT = 0.5
"""Spread of the shifts by which a few latents stand for many: of each channel as a whole, in the latents' own unit."""
MIN_PIXELS = 1536


def preview(latent: Tensor, weights: Tensor) -> Picture:
    """A clean latent [C, h, w] as the denoiser sees it, and weights [3, C+1] -> picture [h, w, 3] uint8.

    Of a noisy latent take the network's clean estimate: noise would show as it is.
    """
    linear, constant = weights[:, :-1], weights[:, -1]
    colours = torch.einsum("oc,chw->hwo", linear, latent.detach().float().cpu()) + constant
    drawn: Picture = colours.add(1.0).mul(127.5).clamp(0, 255).round().to(torch.uint8).numpy()
    return drawn


def fit_preview(latents: Sequence[Tensor], pictures: Sequence[Picture]) -> Tensor:
    """Weights [3, C+1], the last column a constant, that best map latents [C, h, w] to their pictures, made as small.

    pictures: [H, W, 3] uint8, H and W multiples of h and w.
    """
    inputs, targets = [], []
    for latent, picture in zip(latents, pictures, strict=True):
        channels, height, width = latent.shape
        down, across = picture.shape[0] // height, picture.shape[1] // width
        small = np.asarray(picture, np.float64).reshape(height, down, width, across, 3).mean(axis=(1, 3))
        targets.append(torch.from_numpy(small / 127.5 - 1.0).reshape(-1, 3))
        inputs.append(latent.detach().double().cpu().permute(1, 2, 0).reshape(-1, channels))
    x, y = torch.cat(inputs), torch.cat(targets)
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    centred = x - x_mean
    power = centred.T @ centred
    penalty = RIDGE * power.diagonal().mean() * torch.eye(len(power), dtype=power.dtype)
    linear = torch.linalg.solve(power + penalty, centred.T @ (y - y_mean)).T
    constant = y_mean - linear @ x_mean
    return torch.cat([linear, constant[:, None]], dim=1).float()


def preview_of_decoder(engine: "Engine", latents: Sequence[Tensor]) -> Tensor:
    """The map for an engine's decoder, from some clean latents [C, h, w] of its denoiser.

    A few small latents would leave the map open, so they are decoded again with their channels shifted at random.

    Errors: `EngineFailed` where a picture is not finite.
    """
    from .work import decode

    draw = torch.Generator("cpu").manual_seed(0)
    channels, height, width = latents[0].shape
    known = list(latents)
    while len(known) * height * width < MIN_PIXELS:
        shift = SHIFT * torch.randn(channels, 1, 1, generator=draw)
        known.append(latents[len(known) % len(latents)] + shift)
    pictures = []
    for latent in known:
        (picture,) = decode(engine, latent[None])
        if isinstance(picture, Exception):
            raise picture
        pictures.append(picture)
    return fit_preview(known, pictures)


def with_estimates(plan: Plan, specs: Mapping[str, SamplerSpec], own: str) -> tuple[Plan, tuple[bool, ...]]:
    """The plan with rows that keep their clean estimate, and after which rows a preview can be had.

    specs: by model name; own: the model of rows that name none. Rows whose kept combination means something else, and
    those before a row that reads it, stay as they are.
    """
    rows, shown = list(plan.rows), []
    for k, row in enumerate(rows[:-1]):
        out = estimates(specs[row.model or own].prediction, specs[row.model or own].path, row.t)
        clean = out.x0_x, out.x0_f
        if row.keep is None and not rows[k + 1].d:
            rows[k] = replace(row, keep=clean)
        shown.append(rows[k].keep == clean)
    return replace(plan, rows=tuple(rows)), (*shown, True)


def show(live: "Live", canvas: "Canvas", weights: Tensor | None) -> Picture | None:
    """A preview of a picture after its latest step, by the map, or by the decoder where `weights` is None."""
    latent = canvas.x if canvas.step == len(live.plan.rows) else canvas.history.estimate
    if latent is None:
        return None
    if weights is not None:
        return preview(latent, weights)
    from .work import decode

    (picture,) = decode(live.model.engine, latent[None], live.decoder)
    return None if isinstance(picture, Exception) else picture


def find_preview(bundle: "Bundle") -> Tensor | None:
    """The map that a bundle carries, if it carries one."""
    try:
        return read_preview(bundle)
    except BundleError:
        return None


def read_preview(bundle: "Bundle") -> Tensor:
    """The map that a bundle carries, [3, C+1].

    Errors: `BundleError` where it has none, or one for another latent.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path, remedy = bundle.root / "golden" / FILE, f"run `fewstep export {bundle.root} --engine torch --new-golden`"
    try:
        weights = load_file(path)[KEY]
    except (OSError, KeyError, SafetensorError) as error:
        raise BundleError(f"{bundle.name} has no map for previews at {path} ({error!r}); {remedy}") from error
    wanted = (3, bundle.spec.latent.channels + 1)
    if tuple(weights.shape) != wanted:
        raise BundleError(f"{path} has the shape {tuple(weights.shape)}; this bundle's latents need {wanted}; {remedy}")
    return weights
