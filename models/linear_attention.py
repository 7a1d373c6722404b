"""Linear self-attention (LinFusion, Liu et al. 2024): the cost grows with the pixels, not with their square.

A U-Net says it by `fewstep_attention: "linear"` in its config. diffusers does not know that word and would run softmax
with these weights, so such a folder is for this library, or for an exported engine.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from .errors import BundleError

FIELD, LINEAR = "fewstep_attention", "linear"


class LinearAttention(nn.Module):
    """An attention processor: `q (k^T v / n) / (q mean(k) + 1e-4)` with q, k = elu(W (x + P(x))) + 1, per head.

    P is Linear, LayerNorm, LeakyReLU, Linear; its last layer starts at zero. Shapes: x [B, n, D].
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k = _bend(width), _bend(width)

    def forward(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, temb: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """diffusers' processor signature; self-attention over tokens without a mask is all it stands for."""
        if encoder_hidden_states is not None or attention_mask is not None or hidden_states.ndim != 3:
            raise ValueError("linear attention replaces self-attention over tokens [B, n, D] without a mask")
        q = functional.elu(_heads(attn.to_q(hidden_states + self.q(hidden_states)), attn.heads)) + 1.0
        k = functional.elu(_heads(attn.to_k(hidden_states + self.k(hidden_states)), attn.heads)) + 1.0
        v = _heads(attn.to_v(hidden_states), attn.heads)
        mixed = q @ (k.transpose(-1, -2) @ v / hidden_states.shape[1])
        out = mixed / (q @ k.mean(dim=-2, keepdim=True).transpose(-1, -2) + 1e-4)
        out = attn.to_out[0](out.transpose(1, 2).flatten(2))
        dropped: Tensor = attn.to_out[1](out)
        return dropped


def linearise(unet: Any) -> Any:
    """Replace every self-attention of a U-Net in place, and say so in its config; cross-attention stays."""
    for name, module in unet.named_modules():
        if name.endswith(".attn1"):
            module.set_processor(
                LinearAttention(module.query_dim).to(module.to_q.weight.device, module.to_q.weight.dtype)
            )
    unet.register_to_config(**{FIELD: LINEAR})
    return unet


def alter(unet: Any, word: Any) -> Any:
    """`linearise` as a config asks for it.

    Errors: `BundleError` for another word than "linear".
    """
    if word != LINEAR:
        raise BundleError(f"{FIELD} is {word!r}; it must be {LINEAR!r} or absent")
    return linearise(unet)


def _bend(width: int) -> nn.Sequential:
    last = nn.Linear(max(1, width // 4), width)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(width, max(1, width // 4)), nn.LayerNorm(max(1, width // 4)), nn.LeakyReLU(), last)


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, n, H d] -> [B, H, n, d]."""
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads).transpose(1, 2)
