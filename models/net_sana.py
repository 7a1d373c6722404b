"""SANA (flow) and SANA-Sprint (TrigFlow, guidance embedded): linear attention on deeply compressed latents.

Xie et al. 2024 (arXiv 2410.10629) and Chen et al. 2025 (arXiv 2503.09641); networks and numbers as in diffusers'
pipelines.
"""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .families import Facts, Family, latent_of
from .networks import Decoder, Encoder, named, same_batch
from .pipeline_folder import read_config
from .roles import DECODER, ENCODER
from .sana_attention import mend_autoencoder, mend_transformer
from .spec import TextInput

TOKENS = 300
"""Tokens of a prompt that the network sees: the first, then the last 299 behind the instruction."""


class SanaNet(nn.Module):
    """`SanaTransformer2DModel` as (x, t, ctx, ctx_mask) -> eps - x0, with t [B] in 0 .. 1, ctx_mask [B, L].

    The network is told whole thousandths: diffusers cuts the times of its DPM-Solver so, but not the noise levels.
    """

    inputs, outputs = ("x", "t", "ctx", "ctx_mask"), ("f",)

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = mend_transformer(transformer)
        self.scale = float(transformer.config.timestep_scale)

    def forward(self, x: Tensor, t: Tensor, ctx: Tensor, ctx_mask: Tensor) -> Tensor:
        same_batch(x, ctx, ctx_mask)
        thousandths = torch.floor(t * 1000.0 + 1e-4)  # 1e-4: above float32's error, so 0.9 is 900 and not 899
        out: Tensor = self.transformer(
            x,
            encoder_hidden_states=ctx,
            encoder_attention_mask=ctx_mask,
            timestep=thousandths * self.scale,
            return_dict=False,
        )[0]
        return out[:, : x.shape[1]]


class SprintNet(nn.Module):
    """SANA-Sprint's `SanaTransformer2DModel` as (x, t, ctx, ctx_mask, w) -> dx/dt on TrigFlow, sigma_data 1.

    t [B] in 0 .. pi/2; w [B] guidance scale. The network was made for flows: x and t go to the flow's point of the same
    noise level, and its velocity comes back as TrigFlow's (Chen et al. 2025, section 3.1). diffusers' latents are
    sigma_data times these; both sample alike, since everything is linear in it.
    """

    inputs, outputs = ("x", "t", "ctx", "ctx_mask", "w"), ("f",)

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = mend_transformer(transformer)
        self.w_scale = float(transformer.config.guidance_embeds_scale)

    def forward(self, *feeds: Tensor) -> Tensor:
        given = named(self.inputs, feeds)
        x, t = given["x"], given["t"]
        same_batch(x, given["ctx"], given["ctx_mask"])
        flow_t = torch.sin(t) / (torch.cos(t) + torch.sin(t))
        q = flow_t.to(x.dtype).reshape(-1, 1, 1, 1)
        length = torch.sqrt(q**2 + (1 - q) ** 2)
        flow_x = x * length
        v: Tensor = self.transformer(
            flow_x,
            encoder_hidden_states=given["ctx"],
            encoder_attention_mask=given["ctx_mask"],
            guidance=given["w"] * self.w_scale,
            timestep=flow_t,  # unscaled, whatever the config's timestep_scale says: diffusers' Sprint pipeline does so
            return_dict=False,
        )[0]
        v = v[:, : x.shape[1]]
        return ((1 - 2 * q) * flow_x + (1 - 2 * q + 2 * q**2) * v) / length


class GemmaText(nn.Module):
    """Gemma: ids, mask [B, T] int64, keep [B, L] int64 places of the tokens to keep -> ctx [B, L, D], ctx_mask [B, L].

    Attention is causal, so what stands behind a token does not change it: padding may be any length.
    """

    inputs, outputs = ("ids", "mask", "keep"), ("ctx", "ctx_mask")

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, ids: Tensor, mask: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        same_batch(ids, mask, keep)
        states = self.text_encoder(ids, attention_mask=mask)[0]
        ctx = states.gather(1, keep[:, :, None].expand(-1, -1, states.shape[-1]))
        return ctx, mask.gather(1, keep).to(ctx.dtype)


def instruction() -> str:
    """What stands in front of every prompt, as diffusers' pipeline has it."""
    from diffusers import SanaPipeline

    return "\n".join(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)


def _facts(root: Path) -> Facts:
    from transformers import AutoTokenizer

    latent = latent_of(root)
    side = int(read_config(root, "transformer")["sample_size"]) * latent.factor
    prefix = instruction()
    tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer", local_files_only=True)
    length = len(tokenizer.encode(prefix)) + TOKENS - 2
    text = TextInput(length=length, mask=True, lower=True, prefix=prefix, keep=TOKENS)
    return Facts(latent=latent, size=(side, side), text=(text,))


def _sprint_times(scheduler: Any, steps: int, size: tuple[int, int]) -> None:
    """The pipeline's: even steps from pi/2, but 1.3 for the second of two."""
    scheduler.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)


SANA = Family(
    name="sana",
    folder="transformer",
    plain=lambda transformer, control: SanaNet(transformer),
    text=lambda load: GemmaText(load("text_encoder")),
    text_outputs=GemmaText.outputs,
    takes_w=lambda config: False,
    stride=lambda config: int(config["patch_size"]),
    facts=_facts,
    more={
        DECODER: lambda load: Decoder(mend_autoencoder(load("vae"))),
        ENCODER: lambda load: Encoder(mend_autoencoder(load("vae"))),
    },
)
SPRINT = replace(
    SANA,
    name="sana-sprint",
    plain=lambda transformer, control: SprintNet(transformer),
    takes_w=lambda config: True,
    set_times=_sprint_times,
)


def family(config: Mapping[str, Any]) -> Family:
    """The family of a `SanaTransformer2DModel`."""
    return SPRINT if config.get("guidance_embeds") else SANA
