"""Negative prompts without a second evaluation, in the cross-attentions: for students whose guidance is distilled away.

Z+ and Z- are what one query reads from the prompt and from the negative prompt, with the same weights; s is the scale,
0 for none, per row.

nasa (Nguyen et al. 2024, "SNOOPI", NASA):  Z = Z+ - s Z-
nag (Chen et al. 2025, "Normalized Attention Guidance"):  G = Z+ + s (Z+ - Z-), made at most tau times as long as Z+ per
token (L1 norms), then Z = Z+ + alpha (G - Z+). Their scale is 1 + s.

sun (Chai et al. 2023, "SpeedUpNet"): the U-Net's own adapters, which were trained for it (`models.negative_adapter`).

Shapes: neg_ctx [B, L, D] as ctx; neg_scale [B].
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .cross_attention import attend, finish, with_processors
from .denoiser import expand
from .errors import BundleError
from .negative_adapter import FIELD
from .networks import DenoiserNet, named
from .pipeline_folder import read_config

CLASS = "NegativeAttention"
METHODS = ("nasa", "nag", "sun")


@dataclass(frozen=True, kw_only=True)
class Negative:
    """How a bundle takes negative prompts: its component `negative/`, which has settings and no weights.

    tau, alpha: of "nag" only; defaults of its authors.
    """

    method: str = "nag"
    tau: float = 2.5
    alpha: float = 0.25

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise BundleError(f"negative method is {self.method!r}; use one of {', '.join(METHODS)}")
        if not (math.isfinite(self.tau) and self.tau >= 1.0):
            raise BundleError(f"negative tau is {self.tau}; it must be at least 1, the length that changes nothing")
        if not 0.0 < self.alpha <= 1.0:
            raise BundleError(f"negative alpha is {self.alpha}; it must be above 0 and at most 1")

    def mix(self, read: Tensor, avoided: Tensor, scale: Tensor) -> Tensor:
        """Z of Z+, Z- [B, N, D] and s [B]; Z+ to the bit where s is 0."""
        s = expand(scale, read)
        if self.method == "nasa":
            return read - s * avoided
        guided = read + s * (read - avoided)
        length, longest = (z.abs().sum(dim=-1, keepdim=True) for z in (guided, read))
        tiny = torch.finfo(length.dtype).tiny
        guided = guided * (self.tau * longest / length.clamp(min=tiny)).clamp(max=1.0)
        return read + self.alpha * (guided - read)


def load_negative(folder: Path) -> Negative:
    """The component `negative/` of a bundle.

    Errors: `BundleError` naming the unknown or impossible setting.
    """
    config = read_config(folder, "")
    settings = {name: value for name, value in config.items() if not name.startswith("_")}
    if unknown := sorted(set(settings) - {f.name for f in fields(Negative)}):
        raise BundleError(f"{folder}/config.json has {unknown[0]!r}, which this release does not know: upgrade fewstep")
    try:
        return Negative(**settings)
    except TypeError as error:
        raise BundleError(f"{folder}/config.json is not readable: {error}") from error


class NegativeDenoiser(nn.Module):
    """`DenoiserNet` with (neg_ctx, neg_scale) as further inputs."""

    outputs = ("f",)

    def __init__(self, unet: Any, negative: Negative) -> None:
        super().__init__()
        adapted = FIELD in unet.config
        if adapted != (negative.method == "sun"):
            has = "has negative adapters" if adapted else "has no negative adapters"
            raise BundleError(f"negative method is {negative.method!r}, and this U-Net {has}, which 'sun' is for")
        self.net = DenoiserNet(unet if adapted else with_processors(unet, lambda _: _NegativeAttention(negative)))
        self.inputs = (*self.net.inputs, "neg_ctx", "neg_scale")

    def forward(self, *feeds: Tensor) -> Tensor:
        given = named(self.inputs, feeds)
        return self.net.run(given, (given["ctx"], given["neg_ctx"], given["neg_scale"]))


class _NegativeAttention(nn.Module):
    """The attention processor of a cross-attention."""

    def __init__(self, negative: Negative) -> None:
        super().__init__()
        self.negative = negative

    def forward(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: tuple[Tensor, Tensor, Tensor], **_: Any
    ) -> Tensor:
        ctx, neg_ctx, scale = encoder_hidden_states
        query = attn.to_q(hidden_states)
        read, avoided = (attend(attn, query, attn.to_k(c), attn.to_v(c)) for c in (ctx, neg_ctx))
        return finish(attn, self.negative.mix(read, avoided, scale))
