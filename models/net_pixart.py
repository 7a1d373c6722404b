"""PixArt-alpha and -sigma: a transformer on a VP path, with T5 text under a mask.

Chen et al. 2023 (arXiv 2310.00426) and 2024 (arXiv 2403.04692); networks and numbers as in diffusers' pipelines.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .families import Facts, Family, latent_of
from .networks import MaskedText, named, same_batch
from .pipeline_folder import read_config, read_index
from .spec import TextInput

LENGTHS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
"""The pipeline's class -> tokens of a prompt."""


class PixArtNet(nn.Module):
    """`PixArtTransformer2DModel` as (x, t, ctx, ctx_mask[, size_ids]) -> eps.

    t [B] in 0 .. 999; ctx_mask [B, L] 1 at real tokens; size_ids [B, 3] height, width, height/width. The learned
    variances that it also gives are dropped: no sampler here reads them.
    """

    outputs = ("f",)

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer
        if _one_more_axis not in transformer.proj_out._forward_hooks.values():
            transformer.proj_out.register_forward_hook(_one_more_axis)
        self.sized = bool(transformer.use_additional_conditions)
        self.inputs = ("x", "t", "ctx", "ctx_mask", *(("size_ids",) if self.sized else ()))

    def forward(self, *feeds: Tensor) -> Tensor:
        given = named(self.inputs, feeds)
        x = given["x"]
        same_batch(x, given["ctx"], given["ctx_mask"])
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.sized:
            size = given["size_ids"].to(x.dtype)
            added = {"resolution": size[:, :2], "aspect_ratio": size[:, 2:]}
        out: Tensor = self.transformer(
            x,
            encoder_hidden_states=given["ctx"],
            encoder_attention_mask=given["ctx_mask"],
            timestep=given["t"],
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return out[:, : x.shape[1]]


def _one_more_axis(layer: nn.Module, given: Any, out: Tensor) -> Tensor:
    """[B, N, D] -> [B, 1, N, D]: behind its last layer PixArt squeezes axis 1, which an exporter writes down as such
    even where the tokens N stand there and torch would leave them."""
    return out.unsqueeze(1)


def _facts(root: Path) -> Facts:
    latent, config = latent_of(root), read_config(root, "transformer")
    pipeline = read_index(root).get("_class_name")
    side = int(config["sample_size"])
    sized = config.get("use_additional_conditions")
    if sized is None:
        sized = side == 128
    return Facts(
        latent=latent,
        size=(side * latent.factor, side * latent.factor),
        text=(TextInput(length=LENGTHS.get(str(pipeline), 300), mask=True, lower=True),),
        size_ids="pixart" if sized else None,
    )


PIXART = Family(
    name="pixart",
    folder="transformer",
    plain=lambda transformer, control: PixArtNet(transformer),
    text=lambda load: MaskedText(load("text_encoder")),
    text_outputs=MaskedText.outputs,
    takes_w=lambda config: False,
    stride=lambda config: int(config["patch_size"]),
    facts=_facts,
)


def family(config: Mapping[str, Any]) -> Family:
    """The family of a `PixArtTransformer2DModel`."""
    return PIXART
