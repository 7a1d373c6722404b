"""IP-Adapter (Ye et al. 2023): a picture as prompt, by a second cross-attention over a few tokens of it.

Z = softmax(Q K^T / sqrt d) V + s softmax(Q K_i^T / sqrt d) V_i, K_i and V_i of the picture's tokens. Shapes: pixels
[B, 3, S, S] as `CLIPImageProcessor` makes them; img_tok [B, T, D]; img_scale [B, layers], one per cross-attention in
the U-Net's order, 0 for none.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .cross_attention import attend, cross_attentions, finish, with_processors
from .errors import BundleError
from .files import open_safetensors
from .networks import DenoiserNet, named
from .pipeline_folder import read_config

CLASS, WEIGHTS = "IPAdapter", "ip_adapter.safetensors"
FACE_ID = ("perceiver_resampler.proj_in.weight", "norm.weight")
"""Tensors of the projections that read a face recogniser's features, not a picture."""


@dataclass(frozen=True)
class ImagePromptWeights:
    """A published IP-Adapter file: `projection`, from the image encoder's output to tokens; `attention`, the weights
    "{2 k + 1}.to_k_ip.weight" and "to_v_ip" of the k-th cross-attention."""

    source: Path
    projection: dict[str, Tensor]
    attention: dict[str, Tensor]


def read_image_prompt(file: Path) -> ImagePromptWeights:
    """The file's tensors in float32.

    Errors: `BundleError` where it is not a safetensors file of an IP-Adapter that reads a picture.
    """
    with open_safetensors(file) as opened:
        found = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118
    parts = ("image_proj", "ip_adapter")
    projection, attention = ({n[len(p) + 1 :]: t for n, t in found.items() if n.startswith(p + ".")} for p in parts)
    if not (projection and attention):
        raise BundleError(f"{file} is no IP-Adapter: it has no tensors image_proj.* and ip_adapter.*")
    if "proj.weight" not in projection and any(name in projection for name in FACE_ID):
        raise BundleError(
            f"{file} is a Face-ID adapter, which reads a face recogniser's features; use one that reads CLIP's"
        )
    return ImagePromptWeights(file, projection, attention)


def load_image_prompt(folder: Path) -> ImagePromptWeights:
    """The component `ip_adapter/` of a bundle."""
    file = read_config(folder, "").get("weights", WEIGHTS)
    return read_image_prompt(folder / Path(file).name)


class ImagePrompt(nn.Module):
    """`CLIPVisionModelWithProjection` and the adapter's projection as (pixels) -> img_tok."""

    inputs, outputs = ("pixels",), ("img_tok",)

    def __init__(self, encoder: Any, weights: ImagePromptWeights) -> None:
        super().__init__()
        from diffusers.loaders import UNet2DConditionLoadersMixin
        from diffusers.models.embeddings import ImageProjection

        convert = UNet2DConditionLoadersMixin()._convert_ip_adapter_image_proj_to_diffusers
        try:
            self.projection = convert(weights.projection, low_cpu_mem_usage=False)
        except (KeyError, RuntimeError) as error:
            raise BundleError(f"{weights.source} holds no image projection that diffusers knows: {error}") from error
        self.encoder = encoder
        self.pooled = isinstance(self.projection, ImageProjection)

    def forward(self, pixels: Tensor) -> Tensor:
        seen = self.encoder(pixels, output_hidden_states=not self.pooled)
        tokens: Tensor = self.projection(seen.image_embeds if self.pooled else seen.hidden_states[-2])
        return tokens


class ImagePromptedDenoiser(nn.Module):
    """`DenoiserNet` with (img_tok, img_scale) as further inputs."""

    outputs = ("f",)

    def __init__(self, unet: Any, weights: ImagePromptWeights) -> None:
        super().__init__()
        check_image_prompt(unet, weights)
        self.net = DenoiserNet(with_processors(unet, lambda k: _ImageAttention(k, weights)))
        self.inputs = (*self.net.inputs, "img_tok", "img_scale")

    def forward(self, *feeds: Tensor) -> Tensor:
        given = named(self.inputs, feeds)
        return self.net.run(given, (given["ctx"], given["img_tok"], given["img_scale"]))


class _ImageAttention(nn.Module):
    """The attention processor of the k-th cross-attention."""

    def __init__(self, k: int, weights: ImagePromptWeights) -> None:
        super().__init__()
        self.k = k
        self.key, self.value = (nn.Parameter(weights.attention[name], requires_grad=False) for name in _names(k))

    def forward(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: tuple[Tensor, Tensor, Tensor], **_: Any
    ) -> Tensor:
        ctx, tokens, scale = encoder_hidden_states
        query = attn.to_q(hidden_states)
        read = attend(attn, query, attn.to_k(ctx), attn.to_v(ctx))
        seen = attend(attn, query, nn.functional.linear(tokens, self.key), nn.functional.linear(tokens, self.value))
        return finish(attn, read + scale[:, self.k, None, None].to(seen.dtype) * seen)


def check_image_prompt(unet: Any, weights: ImagePromptWeights) -> None:
    """Refuse an adapter for another base.

    Errors: `BundleError` with the layer and both shapes.
    """
    layers = cross_attentions(unet)
    held = sum(name.endswith("to_k_ip.weight") for name in weights.attention)
    if held != len(layers):
        raise BundleError(
            f"{weights.source} is for {held} cross-attentions and this U-Net has {len(layers)}: "
            "take the IP-Adapter that was made for this base"
        )
    for k, layer in enumerate(layers):
        wanted = tuple(unet.get_submodule(layer.removesuffix(".processor")).to_k.weight.shape)
        for name in _names(k):
            shape = tuple(weights.attention[name].shape) if name in weights.attention else None
            # diffusers' own widths: the adapter's tokens are as wide as the prompt's
            if shape != wanted:
                raise BundleError(
                    f"{weights.source} has {name} of shape {shape}, and {layer} needs {wanted}: "
                    "take the IP-Adapter that was made for this base"
                )


def _names(k: int) -> tuple[str, str]:
    return f"{2 * k + 1}.to_k_ip.weight", f"{2 * k + 1}.to_v_ip.weight"
