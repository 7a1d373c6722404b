"""Linear attention of SANA and its autoencoder that survives export.

diffusers divides by `sum + 1e-15`. The ONNX exporter's optimiser (onnxscript: constants within 1e-8 match 0) takes the
1e-15 for a zero and drops it, so that a token which attends to nothing is 0/0. Here the sum is bounded from below
instead: sums are never negative, so both give the same up to one part in 1e15 over the sum, and 0 at 0.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

FLOOR = 1e-15


def mend_transformer(transformer: Any) -> Any:
    """Self-attention of a `SanaTransformer2DModel` as `TokenAttention`."""
    for block in transformer.transformer_blocks:
        block.attn1.set_processor(TokenAttention())
    return transformer


def mend_autoencoder(vae: Any) -> Any:
    """Attention of an `AutoencoderDC` as `PictureAttention`."""
    for part in vae.modules():
        if type(part).__name__ == "SanaMultiscaleLinearAttention":
            part.processor = PictureAttention()
    return vae


class TokenAttention:
    """diffusers' `SanaLinearAttnProcessor2_0` on tokens [B, N, D]."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        query, key, value = (layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v))
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (_by_head(x, attn.heads) for x in (query, key, value))
        out = _attend(functional.relu(query), functional.relu(key), value).to(hidden_states.dtype)
        out = attn.to_out[1](attn.to_out[0](out.flatten(1, 2).transpose(1, 2)))
        return out.clip(-65504, 65504) if hidden_states.dtype == torch.float16 else out  # type: ignore[no-any-return]


class PictureAttention:
    """diffusers' `SanaMultiscaleAttnProcessor2_0` on pictures [B, C, H, W]."""

    def __call__(self, attn: Any, hidden_states: Tensor) -> Tensor:
        height, width = hidden_states.shape[-2:]
        last = hidden_states.movedim(1, -1)
        both = torch.cat([attn.to_q(last), attn.to_k(last), attn.to_v(last)], dim=3).movedim(-1, 1)
        scales = torch.cat([both, *(block(both) for block in attn.to_qkv_multiscale)], dim=1)
        heads = scales.reshape(scales.shape[0], -1, 3 * attn.attention_head_dim, height * width)
        query, key, value = heads.chunk(3, dim=2)
        query, key = attn.nonlinearity(query), attn.nonlinearity(key)
        if height * width > attn.attention_head_dim:
            out = _attend(query, key, value).to(hidden_states.dtype)
        else:
            weights = torch.matmul(key.transpose(-1, -2), query).float()
            weights = weights / weights.sum(dim=2, keepdim=True).clamp_min(FLOOR)
            out = torch.matmul(value, weights.to(value.dtype))
        out = out.reshape(out.shape[0], -1, height, width)
        out = attn.to_out(out.movedim(1, -1)).movedim(-1, 1)
        norm = attn.norm_out
        out = norm(out.movedim(1, -1)).movedim(-1, 1) if attn.norm_type == "rms_norm" else norm(out)
        return out + hidden_states if attn.residual_connection else out  # type: ignore[no-any-return]


def _by_head(x: Tensor, heads: int) -> Tensor:
    """[B, N, heads D] -> [B, heads, D, N]."""
    return x.transpose(1, 2).reshape(x.shape[0], heads, -1, x.shape[1])


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, heads, D, N] each, query and key not negative -> float32: `(v k^T) q` over `sum(k)^T q`."""
    query, key, value = query.float(), key.float(), value.float()
    value = torch.cat([value, torch.ones_like(value[:, :, :1])], dim=2)
    out = torch.matmul(torch.matmul(value, key.transpose(2, 3)), query)
    return out[:, :, :-1] / out[:, :, -1:].clamp_min(FLOOR)
