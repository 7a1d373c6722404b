"""Guidance adapters (AGD, Jensen & Sadat 2025): small attentions beside a frozen U-Net's own, which know the scale.

Each cross-attention gives `Attn(x, prompt) + W_o Attn(W_q x, W_k e, W_v e)`, e the tokens of the scale, the time and
the prompt; W_o starts at zero. A U-Net says it by `fewstep_guidance_adapter`, their width, in its config. diffusers
does not know that word, so such a folder is for this library, or for an exported engine.

Shapes: w, t [B]; ctx [B, L, D]; tokens [B, 2 + L, width].
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .cross_attention import CROSS, attend, cross_attentions, finish
from .errors import BundleError

FIELD = "fewstep_guidance_adapter"


class GuidanceTokens(nn.Module):
    """What adapters read: one token of the scale, one of the time, and the prompt's, in the adapters' width."""

    def __init__(self, width: int, prompt_width: int) -> None:
        super().__init__()
        self.width = width
        self.scale, self.time = _embed(width), _embed(width)
        self.prompt = nn.Sequential(nn.LayerNorm(prompt_width), nn.Linear(prompt_width, width))

    def forward(self, w: Tensor, t: Tensor, ctx: Tensor) -> Tensor:
        scale = self.scale(_waves(w - 1.0, 8.0, self.width).to(ctx.dtype))
        time = self.time(_waves(t, 1.0, self.width).to(ctx.dtype))
        return torch.cat([scale[:, None], time[:, None], self.prompt(ctx)], dim=1)


class GuidanceAdapter(nn.Module):
    """The attention processor of a cross-attention; its `encoder_hidden_states` is (ctx, tokens)."""

    def __init__(self, query_width: int, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(n, width, bias=False) for n in (query_width, width, width))
        self.out = nn.Linear(width, query_width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None, temb: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """diffusers' processor signature; the prompt has no mask in the U-Nets that this stands in."""
        ctx, tokens = encoder_hidden_states
        plain = finish(attn, attend(attn, attn.to_q(hidden_states), attn.to_k(ctx), attn.to_v(ctx)))
        read = functional.scaled_dot_product_attention(
            self.q(hidden_states)[:, None], self.k(tokens)[:, None], self.v(tokens)[:, None]
        )
        added: Tensor = self.out(read[:, 0])
        return plain + added


def adapt(unet: Any, width: int) -> Any:
    """Add adapters to a `UNet2DConditionModel` in place, and say so in its config. They change nothing at first.

    Errors: `BundleError` for a width that is not an even number from 4.
    """
    if not isinstance(width, int) or width < 4 or width % 2:
        raise BundleError(f"{FIELD} is {width!r}; it must be an even width of at least 4, as 32")
    like = next(unet.parameters())
    for name in cross_attentions(unet):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        attention.set_processor(GuidanceAdapter(attention.query_dim, width).to(like.device, like.dtype))
    unet.guidance_tokens = GuidanceTokens(width, unet.config.cross_attention_dim).to(like.device, like.dtype)
    unet.register_to_config(**{FIELD: width})
    return unet


def is_adapter(name: str) -> bool:
    """Whether a weight of an adapted U-Net is of its adapters, by name: these train, the others are frozen."""
    return name.startswith("guidance_tokens.") or f"{CROSS}." in name


def _embed(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.LayerNorm(width))


def _waves(value: Tensor, rate: float, width: int) -> Tensor:
    """[B] -> [B, width] float32: sines and cosines at rates from `rate` down to 1e-4 of it."""
    half = width // 2
    rates = rate * torch.exp(torch.arange(half, dtype=torch.float32, device=value.device) * (-9.2103404 / (half - 1)))
    angle = value.float()[:, None] * rates[None]
    return torch.cat([angle.sin(), angle.cos()], dim=1)
