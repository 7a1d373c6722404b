"""FLUX.1 schnell and dev: a flow transformer on packed latents, with T5 and CLIP's pooled text.

Black Forest Labs 2024; networks and numbers as in diffusers' pipeline.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .families import Facts, Family, latent_of
from .networks import named, same_batch
from .spec import TextInput

SIDE = 1024
"""The picture size that FLUX.1 was made for; its folders do not state one."""


class FluxNet(nn.Module):
    """`FluxTransformer2DModel` as (x, t, ctx, pooled[, w]) -> eps - x0, with t [B] in 0 .. 1, w [B] (dev) as diffusers'
    `guidance_scale`. Packing into 2x2 patches and the places of the tokens are made here: x is [B, C, h, w]."""

    outputs = ("f",)

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer
        self.takes_w = bool(transformer.config.guidance_embeds)
        self.inputs = ("x", "t", "ctx", "pooled", *(("w",) if self.takes_w else ()))

    def forward(self, *feeds: Tensor) -> Tensor:
        given = named(self.inputs, feeds)
        x, ctx = given["x"], given["ctx"]
        same_batch(x, ctx, given["pooled"])
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        out: Tensor = self.transformer(
            hidden_states=_pack(x),
            timestep=given["t"],  # diffusers' network multiplies it by 1000 itself
            guidance=given["w"] if self.takes_w else None,
            pooled_projections=given["pooled"],
            encoder_hidden_states=ctx,
            txt_ids=torch.zeros(ctx.shape[1], 3, device=x.device),
            img_ids=_places(rows, columns, x.device),
            return_dict=False,
        )[0]
        return _unpack(out, rows, columns)


class FluxText(nn.Module):
    """CLIP and T5: ids [B, L], ids_2 [B, L2] -> ctx [B, L2, D] from T5 without a mask, pooled [B, P] from CLIP."""

    inputs, outputs = ("ids", "ids_2"), ("ctx", "pooled")

    def __init__(self, first: Any, second: Any) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, ids: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor]:
        return self.second(ids_2)[0], self.first(ids).pooler_output


def _pack(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h/2 w/2, 4 C]."""
    batch, channels, height, width = x.shape
    patches = x.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // 2) * (width // 2), 4 * channels)


def _unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """[B, rows columns, 4 C] -> [B, C, 2 rows, 2 columns]."""
    batch, channels = tokens.shape[0], tokens.shape[2] // 4
    patches = tokens.reshape(batch, rows, columns, channels, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, 2 * rows, 2 * columns)


def _places(rows: int, columns: int, device: torch.device) -> Tensor:
    """(0, row, column) of each token, [rows columns, 3]."""
    row = torch.arange(rows, device=device, dtype=torch.float32)[:, None].expand(-1, columns)
    column = torch.arange(columns, device=device, dtype=torch.float32)[None].expand(rows, -1)
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1)


def _facts(root: Path, tokens: int) -> Facts:
    text = (TextInput(cut=True), TextInput(tokenizer="tokenizer_2", length=tokens))  # T5 reads what CLIP cannot hold
    return Facts(latent=latent_of(root), size=(SIDE, SIDE), text=text)


def times_by_size(scheduler: Any, steps: int, size: tuple[int, int]) -> None:
    """From 1 to 1/steps, shifted by the number of 2x2 patches of the picture's latent where the scheduler says so."""
    width, height = size
    sigmas = [1.0 + (1.0 / steps - 1.0) * k / max(steps - 1, 1) for k in range(steps)]
    scheduler.set_timesteps(sigmas=sigmas, mu=size_shift(scheduler.config, (width // 16) * (height // 16)))


def size_shift(config: Mapping[str, Any], tokens: int) -> float:
    """diffusers' `calculate_shift`: linear in the tokens between the scheduler's two known points."""
    fewest, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (high - low) / (most - fewest)
    return float(tokens * slope + low - slope * fewest)


SCHNELL = Family(
    name="flux-schnell",
    folder="transformer",
    plain=lambda transformer, control: FluxNet(transformer),
    text=lambda load: FluxText(load("text_encoder"), load("text_encoder_2")),
    text_outputs=FluxText.outputs,
    takes_w=lambda config: False,
    stride=lambda config: 2,
    facts=lambda root: _facts(root, 256),
    set_times=times_by_size,
)
DEV = replace(SCHNELL, name="flux-dev", takes_w=lambda config: True, facts=lambda root: _facts(root, 512))


def family(config: Mapping[str, Any]) -> Family:
    """The family of a `FluxTransformer2DModel`."""
    return DEV if config.get("guidance_embeds") else SCHNELL
