"""Model families: which networks a bundle's components make, and what stands between them and the roles.

A family is recognised by the class that its denoiser's `config.json` names. Everything beyond this room sees roles
(`fewstep.models.roles`) and named tensors only.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from .errors import BundleError
from .networks import ControlNet, Decoder, DenoiserNet, Encoder, TextEncoder, TextEncoderXL
from .roles import CONTROLNET, DECODER, DENOISER, DENOISER_CONTROL, ENCODER, TEXT

Load = Callable[[str], Any]
"""A component's name -> the component, as its own class."""


@dataclass(frozen=True)
class Family:
    """denoiser: (component, with ControlNet inputs or not) -> network. text: the encoders' network, which gives
    `text_outputs`. Of the denoiser's config: takes_w, whether it takes a guidance scale; stride, what a latent's sides
    must be multiples of."""

    name: str
    folder: str
    denoiser: Callable[[Any, bool], nn.Module]
    text: Callable[[Load], nn.Module]
    text_outputs: tuple[str, ...]
    takes_w: Callable[[Mapping[str, Any]], bool]
    stride: Callable[[Mapping[str, Any]], int]

    def network(self, role: str, load: Load) -> nn.Module:
        """The network of one role, for evaluation; `load` gives its components."""
        if role in (DENOISER, DENOISER_CONTROL):
            net = self.denoiser(load(self.folder), role == DENOISER_CONTROL)
        elif role == TEXT:
            net = self.text(load)
        elif role == CONTROLNET:
            net = ControlNet(load("controlnet"))
        else:
            net = {DECODER: Decoder, ENCODER: Encoder}[role](load("vae"))
        return net.eval()


def _unet(unet: Any, control: bool) -> nn.Module:
    return DenoiserNet(unet, control=control)


def _unet_takes_w(config: Mapping[str, Any]) -> bool:
    return config.get("time_cond_proj_dim") is not None


def _unet_stride(config: Mapping[str, Any]) -> int:
    return int(2 ** (len(config["block_out_channels"]) - 1))


SD = Family(
    name="sd",
    folder="unet",
    denoiser=_unet,
    text=lambda load: TextEncoder(load("text_encoder")),
    text_outputs=TextEncoder.outputs,
    takes_w=_unet_takes_w,
    stride=_unet_stride,
)
SDXL = replace(
    SD,
    name="sdxl",
    text=lambda load: TextEncoderXL(load("text_encoder"), load("text_encoder_2")),
    text_outputs=TextEncoderXL.outputs,
)


def _unet_family(config: Mapping[str, Any]) -> Family:
    return SDXL if config.get("addition_embed_type") == "text_time" else SD


FAMILIES: dict[str, Callable[[Mapping[str, Any]], Family]] = {"UNet2DConditionModel": _unet_family}
"""The denoiser's class -> what chooses the family by the denoiser's config."""


def find_family(root: Path) -> Family:
    """The family of a bundle or diffusers folder.

    Errors: `BundleError` where no denoiser is there, or of a class that this release does not know.
    """
    for folder in ("unet", "transformer"):
        path = root / folder / "config.json"
        if not path.is_file():
            continue
        config = json.loads(path.read_text())
        name = config.get("_class_name")
        if name not in FAMILIES:
            raise BundleError(f"{path} names the class {name!r}; this release knows {', '.join(FAMILIES)}")
        return FAMILIES[name](config)
    raise BundleError(f"{root} has neither unet/config.json nor transformer/config.json; a bundle holds its denoiser")
