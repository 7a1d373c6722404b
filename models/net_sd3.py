"""Stable Diffusion 3 and 3.5: MMDiT on a flow path, with two CLIPs and T5.

Esser et al. 2024 (arXiv 2403.03206); networks and numbers as in diffusers' pipeline.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .families import Facts, Family, latent_of
from .net_flux import size_shift
from .networks import same_batch
from .pipeline_folder import read_config
from .spec import TextInput


class SD3Net(nn.Module):
    """`SD3Transformer2DModel` as (x, t, ctx, pooled) -> eps - x0, with t [B] in 0 .. 1."""

    inputs, outputs = ("x", "t", "ctx", "pooled"), ("f",)

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, x: Tensor, t: Tensor, ctx: Tensor, pooled: Tensor) -> Tensor:
        same_batch(x, ctx, pooled)
        out: Tensor = self.transformer(
            x, encoder_hidden_states=ctx, pooled_projections=pooled, timestep=t * 1000.0, return_dict=False
        )[0]
        return out


class SD3Text(nn.Module):
    """CLIP-L, CLIP-G and T5: ids, ids_2 [B, L], ids_3 [B, L3] -> ctx [B, L + L3, D], pooled [B, P + P2].

    The CLIPs' states before the last layer lie side by side, padded with zeros to T5's width, and T5's follow them.
    """

    inputs, outputs = ("ids", "ids_2", "ids_3"), ("ctx", "pooled")

    def __init__(self, first: Any, second: Any, third: Any) -> None:
        super().__init__()
        self.first, self.second, self.third = first, second, third

    def forward(self, ids: Tensor, ids_2: Tensor, ids_3: Tensor) -> tuple[Tensor, Tensor]:
        one = self.first(ids, output_hidden_states=True)
        two = self.second(ids_2, output_hidden_states=True)
        words = self.third(ids_3)[0]
        clip = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
        clip = functional.pad(clip, (0, words.shape[-1] - clip.shape[-1]))
        return torch.cat([clip, words], dim=1), torch.cat([one[0], two[0]], dim=-1)


def _facts(root: Path) -> Facts:
    latent = latent_of(root)
    side = int(read_config(root, "transformer")["sample_size"]) * latent.factor
    text = (
        TextInput(cut=True),  # T5 reads what CLIP has no room for
        TextInput(tokenizer="tokenizer_2", cut=True),
        TextInput(tokenizer="tokenizer_3", length=256),
    )
    return Facts(latent=latent, size=(side, side), text=text)


def _set_times(scheduler: Any, steps: int, size: tuple[int, int]) -> None:
    shift = {}
    if scheduler.config.get("use_dynamic_shifting"):
        shift["mu"] = size_shift(scheduler.config, (size[0] // 16) * (size[1] // 16))
    scheduler.set_timesteps(steps, **shift)


SD3 = Family(
    name="sd3",
    folder="transformer",
    plain=lambda transformer, control: SD3Net(transformer),
    text=lambda load: SD3Text(load("text_encoder"), load("text_encoder_2"), load("text_encoder_3")),
    text_outputs=SD3Text.outputs,
    takes_w=lambda config: False,
    stride=lambda config: int(config["patch_size"]),
    facts=_facts,
    set_times=_set_times,
)


def family(config: Mapping[str, Any]) -> Family:
    """The family of an `SD3Transformer2DModel`."""
    return SD3
