"""What can steer a `UNet2DConditionModel`: ControlNets, T2I-Adapters, IP-Adapters, LoRAs by row, negative prompts."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .net_control import AdaptedDenoiser, Adapter, control_network
from .net_image_prompt import ImagePrompt, ImagePromptedDenoiser
from .net_lora import LoraDenoiser
from .net_negative import NegativeDenoiser
from .roles import (
    ADAPTER,
    CONTROLNET,
    DENOISER_ADAPTER,
    DENOISER_IMAGE_PROMPT,
    DENOISER_LORA,
    DENOISER_NEGATIVE,
    IMAGE_PROMPT,
)

UNET_ROLES: Mapping[str, Callable[[Callable[[str], Any]], nn.Module]] = {
    CONTROLNET: lambda load: control_network(load("controlnet")),
    ADAPTER: lambda load: Adapter(load("t2i_adapter")),
    DENOISER_ADAPTER: lambda load: AdaptedDenoiser(load("unet"), load("t2i_adapter")),
    IMAGE_PROMPT: lambda load: ImagePrompt(load("image_encoder"), load("ip_adapter")),
    DENOISER_IMAGE_PROMPT: lambda load: ImagePromptedDenoiser(load("unet"), load("ip_adapter")),
    DENOISER_LORA: lambda load: LoraDenoiser(load("unet"), load("loras")),
    DENOISER_NEGATIVE: lambda load: NegativeDenoiser(load("unet"), load("negative")),
}
"""Role -> its network, given what loads a component by name."""
