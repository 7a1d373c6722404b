"""A U-Net whose cross-attentions read more than the prompt: the same weights, other attention processors.

The U-Net hands `encoder_hidden_states` to its cross-attentions as it is; here that is a tuple, the prompt first.
"""

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from .errors import BundleError

CROSS = ".attn2.processor"


def with_processors(unet: Any, make: Callable[[int], nn.Module]) -> Any:
    """A copy of a `UNet2DConditionModel` that shares its weights, with `make(k)` in the k-th cross-attention.

    The given U-Net keeps its own processors, so its plain outputs stay as they are to the bit.

    Errors: `BundleError` where an attention does more than the one that `attend` and `finish` compute.
    """
    clone = sharing_copy(unet)
    processors = dict(clone.attn_processors)
    if own := [name for name in cross_attentions(unet) if isinstance(processors[name], nn.Module)]:
        kind = type(processors[own[0]]).__name__
        raise BundleError(f"{own[0]} of this U-Net is a {kind} already, and one attention cannot be two of them")
    for k, name in enumerate(cross_attentions(unet)):
        attention = clone.get_submodule(name.removesuffix(".processor"))
        special = ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k")
        if attention.residual_connection or any(getattr(attention, part, None) is not None for part in special):
            raise BundleError(f"{name} of this U-Net is not the plain cross-attention; its prompt cannot be joined")
        processors[name] = make(k)
    clone.set_attn_processor(processors)
    return clone


def sharing_copy(module: Any) -> Any:
    """The same modules anew, to be rearranged, over the very same weights."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})


def cross_attentions(unet: Any) -> list[str]:
    """The names of its cross-attentions' processors, in the order in which IP-Adapter files count them."""
    return [name for name in unet.attn_processors if name.endswith(CROSS)]


def attend(attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt d) V over the heads; [B, N, D], [B, L, D], [B, L, D] -> [B, N, D]."""

    def heads(x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], attention.heads, -1).transpose(1, 2)

    out: Tensor = functional.scaled_dot_product_attention(heads(query), heads(key), heads(value))
    return out.transpose(1, 2).flatten(2)


def finish(attention: Any, out: Tensor) -> Tensor:
    """The attention's projection of what was attended to; its dropout is none outside training."""
    projected: Tensor = attention.to_out[1](attention.to_out[0](out)) / attention.rescale_output_factor
    return projected
