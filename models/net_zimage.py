"""Z-Image: a single-stream transformer on a flow path, with Qwen3 text in a chat template.

Tongyi-MAI 2025; networks and numbers as in diffusers' pipeline. There a prompt has as many tokens as it needs; here it
has a fixed number and a mask, and rotations are real numbers, so that rows share a batch and the network can be
exported.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .errors import BundleError
from .families import Facts, Family, latent_of
from .net_flux import times_by_size
from .networks import MaskedText, same_batch
from .spec import TextInput

BLOCK = 32
"""Tokens come in multiples of this; the rest is filled with learned padding that is seen."""
TOKENS, SIDE, PATCH = 512, 1024, 2
Angles = tuple[Tensor, Tensor]
"""Cosines and sines, each [B, S, D/2]."""


class ZImageNet(nn.Module):
    """`ZImageTransformer2DModel` as (x, t, ctx, ctx_mask) -> eps - x0, with t [B] in 0 .. 1.

    ctx_mask [B, L] is 1 at a prompt's tokens, which stand first. A picture's own tokens are placed behind the prompt's,
    so their rotations depend on its length and are made row by row.
    """

    inputs, outputs = ("x", "t", "ctx", "ctx_mask"), ("f",)

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer
        for block in (*transformer.noise_refiner, *transformer.context_refiner, *transformer.layers):
            block.attention.set_processor(RealAttention())
        for axis, (width, most) in enumerate(zip(transformer.axes_dims, transformer.axes_lens, strict=True)):
            rate = 1.0 / (transformer.rope_theta ** (torch.arange(0, width, 2, dtype=torch.float64) / width))
            angle = torch.outer(torch.arange(most, dtype=torch.float64), rate).float()
            self.register_buffer(f"cos_{axis}", angle.cos(), persistent=False)
            self.register_buffer(f"sin_{axis}", angle.sin(), persistent=False)

    def forward(self, x: Tensor, t: Tensor, ctx: Tensor, ctx_mask: Tensor) -> Tensor:
        same_batch(x, ctx, ctx_mask)
        net, key = self.transformer, f"{PATCH}-1"
        rows, columns = x.shape[2] // PATCH, x.shape[3] // PATCH
        time = net.t_embedder((1.0 - t) * net.t_scale).to(x.dtype)

        words, used, count = self._words(ctx, ctx_mask)
        word_angles = self._word_angles(x.shape[0], words.shape[1])
        for layer in net.context_refiner:
            words = layer(words, used, word_angles)

        picture = net.all_x_embedder[key](_pack(x))
        filler = -picture.shape[1] % BLOCK
        picture = torch.cat([picture, net.x_pad_token.expand(x.shape[0], filler, -1)], dim=1)
        angles = self._picture_angles(count + 1, rows, columns, filler)
        for layer in net.noise_refiner:
            picture = layer(picture, None, angles, time)

        both = torch.cat([picture, words], dim=1)
        seen = torch.cat([torch.ones_like(picture[:, :, 0], dtype=torch.bool), used], dim=1)
        every = tuple(torch.cat(pair, dim=1) for pair in zip(angles, word_angles, strict=True))
        for layer in net.layers:
            both = layer(both, seen, every, time)
        out = net.all_final_layer[key](both, c=time)[:, : rows * columns]
        return -_unpack(out, rows, columns)

    def _words(self, ctx: Tensor, ctx_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Prompt tokens [B, L', D], which of them are seen [B, L'], and how many those are [B]."""
        words = self.transformer.cap_embedder(ctx)
        filler = -words.shape[1] % BLOCK
        words = functional.pad(words, (0, 0, 0, filler))
        real = functional.pad(ctx_mask, (0, filler)) > 0.5
        count = ((real.sum(dim=1) + BLOCK - 1) // BLOCK) * BLOCK
        words = torch.where(real[:, :, None], words, self.transformer.cap_pad_token)
        return words, torch.arange(words.shape[1], device=ctx.device)[None] < count[:, None], count

    def _word_angles(self, batch: int, length: int) -> Angles:
        """A prompt's tokens are placed at 1, 2, ... on the first axis and 0 on the others."""
        first = [getattr(self, f"{kind}_0")[1 : length + 1] for kind in ("cos", "sin")]
        rest = sum(getattr(self, f"cos_{axis}").shape[1] for axis in (1, 2))
        cos = functional.pad(first[0], (0, rest), value=1.0)
        return tuple(a[None].expand(batch, -1, -1) for a in (cos, functional.pad(first[1], (0, rest))))  # type: ignore

    def _picture_angles(self, place: Tensor, rows: int, columns: int, filler: int) -> Angles:
        """Picture tokens at (place, row, column), padding at (0, 0, 0)."""
        out = []
        for kind, still in (("cos", 1.0), ("sin", 0.0)):
            first = getattr(self, f"{kind}_0")[place][:, None, None].expand(-1, rows, columns, -1)
            row = getattr(self, f"{kind}_1")[:rows][None, :, None].expand(first.shape[0], -1, columns, -1)
            column = getattr(self, f"{kind}_2")[:columns][None, None].expand(first.shape[0], rows, -1, -1)
            angle = torch.cat([first, row, column], dim=-1).flatten(1, 2)
            out.append(functional.pad(angle, (0, 0, 0, filler), value=still))
        return out[0], out[1]


class RealAttention:
    """diffusers' `ZSingleStreamAttnProcessor` with rotations as real arithmetic: exporters have no complex numbers."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Angles | None = None,
    ) -> Tensor:
        query, key, value = (
            layer(hidden_states).reshape(*hidden_states.shape[:2], attn.heads, -1)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        if freqs_cis is not None:
            query, key = _rotate(query, freqs_cis), _rotate(key, freqs_cis)
        mask = None if attention_mask is None else attention_mask[:, None, None]
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        out = attn.to_out[0](out.transpose(1, 2).flatten(2, 3))
        return attn.to_out[1](out) if len(attn.to_out) > 1 else out  # type: ignore[no-any-return]


def _rotate(x: Tensor, angles: Angles) -> Tensor:
    """[B, S, H, D]: neighbours (2k, 2k+1) turned by the k-th angle of their token."""
    cos, sin = (angle[:, :, None] for angle in angles)
    first, second = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).reshape(x.shape).to(x.dtype)


def _pack(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h/2 w/2, 4 C], channels last in a patch."""
    batch, channels, height, width = x.shape
    rows, columns = height // PATCH, width // PATCH
    patches = x.reshape(batch, channels, rows, PATCH, columns, PATCH)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, PATCH * PATCH * channels)


def _unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """[B, rows columns, 4 C] -> [B, C, 2 rows, 2 columns]."""
    batch, channels = tokens.shape[0], tokens.shape[2] // (PATCH * PATCH)
    patches = tokens.reshape(batch, rows, columns, PATCH, PATCH, channels)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, PATCH * rows, PATCH * columns)


def _facts(root: Path) -> Facts:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer", local_files_only=True)
    if tokenizer.padding_side != "right":
        raise BundleError(f"{root}/tokenizer pads on the {tokenizer.padding_side}; set its padding_side to right")
    mark = "\N{OBJECT REPLACEMENT CHARACTER}"
    written = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    prefix, suffix = str(written).split(mark)
    text = TextInput(length=TOKENS, mask=True, prefix=prefix, suffix=suffix)
    return Facts(latent=latent_of(root), size=(SIDE, SIDE), text=(text,))


Z_IMAGE = Family(
    name="z-image",
    folder="transformer",
    plain=lambda transformer, control: ZImageNet(transformer),
    text=lambda load: MaskedText(load("text_encoder"), layer=-2),
    text_outputs=MaskedText.outputs,
    takes_w=lambda config: False,
    stride=lambda config: PATCH,
    facts=_facts,
    set_times=times_by_size,
)


def family(config: Mapping[str, Any]) -> Family:
    """The family of a `ZImageTransformer2DModel`."""
    return Z_IMAGE
