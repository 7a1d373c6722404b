"""Adapters that read a prompt to avoid (SpeedUpNet, Chai et al. 2023): guidance in one evaluation of a frozen U-Net.

Each cross-attention Z = Attn(Q, K, V) of the prompt gets two more, with keys and values of their own: Z- of the prompt
to avoid and Z+ of the prompt again. Each is made as long as Z, scaled and shifted by learned vectors, and
`Z + s (Z+ - Z-)` goes on, s = 1 as trained. A fresh adapter reads with copies of the U-Net's own keys and values, so
that avoiding the prompt itself changes nothing. Lengths are over each row's whole Z, where the authors' code takes the
whole batch's, so that a row's answer does not depend on its neighbours.

A U-Net says it by `fewstep_negative_adapter`, the number of tokens of the empty prompt, which it keeps and avoids where
no other is given. diffusers does not know that word, so such a folder is for this library, or for an exported engine.

Shapes: ctx, avoided [B, L, D]; scale [B]; queries [B, N, C].
"""

from typing import Any

import torch
from torch import Tensor, nn

from .cross_attention import CROSS, attend, cross_attentions, finish
from .denoiser import expand
from .errors import BundleError

FIELD = "fewstep_negative_adapter"


class _Reading(nn.Module):
    """Keys and values of one more attention, and how what it reads is brought to the size of the plain one's."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        key, value = attention.to_k, attention.to_v
        self.k = nn.Linear(key.in_features, key.out_features, bias=False)
        self.v = nn.Linear(value.in_features, value.out_features, bias=False)
        self.k.weight.data.copy_(key.weight.data)
        self.v.weight.data.copy_(value.weight.data)
        self.gain = nn.Parameter(torch.ones(value.out_features))
        self.shift = nn.Parameter(torch.zeros(value.out_features))

    def forward(self, attention: Any, query: Tensor, ctx: Tensor, plain: Tensor) -> Tensor:
        read = attend(attention, query, self.k(ctx), self.v(ctx))
        wanted, length = (z.float().flatten(1).square().sum(1).sqrt() for z in (plain, read))
        sized = read * expand(wanted / length.clamp(min=1e-6), read)
        return self.gain * sized + self.shift


class NegativeAdapter(nn.Module):
    """The attention processor of a cross-attention; its `encoder_hidden_states` is (ctx, avoided[, scale])."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.more, self.less = _Reading(attention), _Reading(attention)

    def forward(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: tuple[Tensor, ...],
        attention_mask: Tensor | None = None, temb: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """diffusers' processor signature; the prompt has no mask in the U-Nets that this stands in."""
        ctx, avoided, *scale = encoder_hidden_states
        query = attn.to_q(hidden_states)
        plain = attend(attn, query, attn.to_k(ctx), attn.to_v(ctx))
        offset = self.more(attn, query, ctx, plain) - self.less(attn, query, avoided, plain)
        offset = offset * expand(scale[0], offset) if scale else offset
        return finish(attn, plain + offset)


def add_negative(unet: Any, tokens: int) -> Any:
    """Add adapters to a `UNet2DConditionModel` in place, and say so in its config. The empty prompt's tokens, `avoided`
    [tokens, D], are zeros until they are filled in.

    Errors: `BundleError` for a count that is none, and for a U-Net whose cross-attentions are others already.
    """
    if not isinstance(tokens, int) or tokens < 1:
        raise BundleError(f"{FIELD} is {tokens!r}; it must be the number of tokens of the empty prompt, as 77")
    like = next(unet.parameters())
    for name in cross_attentions(unet):
        if isinstance(unet.attn_processors[name], nn.Module):
            raise BundleError(f"{name} of this U-Net is adapted already; negative adapters need a plain one")
        attention = unet.get_submodule(name.removesuffix(".processor"))
        attention.set_processor(NegativeAdapter(attention).to(like.device, like.dtype))
    empty = torch.zeros(tokens, unet.config.cross_attention_dim, device=like.device, dtype=like.dtype)
    unet.register_buffer("avoided", empty)
    unet.register_to_config(**{FIELD: tokens})
    return unet


def avoids(network: Any) -> bool:
    """Whether a network has these adapters."""
    return FIELD in network.config


def is_negative_adapter(name: str) -> bool:
    """Whether a weight of an adapted U-Net is of its adapters, by name: these train, the others are frozen."""
    return f"{CROSS}." in name
