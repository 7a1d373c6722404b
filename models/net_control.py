"""Networks that follow a picture: ControlNet-Union and T2I-Adapter.

Shapes as in `fewstep.models.networks`; kind [B] int64, which of a union's control types a row's picture is.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .cross_attention import sharing_copy
from .denoiser import expand
from .networks import ControlNet, DenoiserNet, named, residual_count, size_inputs, size_settings


def control_network(controlnet: Any) -> nn.Module:
    """The network of a `ControlNetModel` or a `ControlNetUnionModel`."""
    return UnionControl(controlnet) if hasattr(controlnet, "task_embedding") else ControlNet(controlnet)


class UnionControl(nn.Module):
    """`ControlNetUnionModel` as (x, t, ctx[, pooled, size_ids], edge, kind, scale) -> residuals, the middle last.

    One picture per row, and every row may be of another kind: diffusers' `control_type_idx` takes numbers for the whole
    batch, and is given here each row's own. Equal to diffusers' call on one row, for every row: over several rows its
    attention between control tokens takes the batch for their sequence and would mix the rows.
    """

    def __init__(self, controlnet: Any) -> None:
        super().__init__()
        self.controlnet = sharing_copy(controlnet)
        self.controlnet.transformer_layes = nn.ModuleList(map(_Alone, self.controlnet.transformer_layes))
        self.kinds = int(controlnet.config.num_control_type)
        self.inputs = ("x", "t", "ctx", *size_inputs(controlnet), "edge", "kind", "scale")
        self.outputs = tuple(f"residual_{k}" for k in range(residual_count(controlnet)))

    def forward(self, *feeds: Tensor) -> tuple[Tensor, ...]:
        given = named(self.inputs, feeds)
        kind, x = given["kind"], given["x"]
        one_hot = (kind[:, None] == torch.arange(self.kinds, device=kind.device)).to(x.dtype)
        down, mid = self.controlnet(
            x, given["t"], given["ctx"], controlnet_cond=[given["edge"]], control_type=one_hot,
            control_type_idx=[kind], conditioning_scale=[expand(given["scale"], x)], return_dict=False,
            **size_settings(given),
        )  # fmt: skip
        return (*down, mid)


class _Alone(nn.Module):
    """A layer over sequences [L, N, C], given tokens [B, K, C] as B K sequences of one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.layer(tokens.flatten(0, 1)[None])
        return out.reshape(tokens.shape)


class Adapter(nn.Module):
    """`T2IAdapter` as (edge) -> feature maps for the U-Net's down blocks, from the picture alone: once per request.

    An adapter of one channel reads the picture's first: its pictures are grey.
    """

    inputs = ("edge",)

    def __init__(self, adapter: Any) -> None:
        super().__init__()
        self.adapter = adapter
        self.channels = int(adapter.config.in_channels)
        self.outputs = feature_names(adapter)

    def forward(self, edge: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.adapter(edge[:, : self.channels]))


class AdaptedDenoiser(nn.Module):
    """`DenoiserNet` with an adapter's feature maps as inputs, already multiplied by their scale; zeros are none."""

    outputs = ("f",)

    def __init__(self, unet: Any, adapter: Any) -> None:
        super().__init__()
        self.net = DenoiserNet(unet)
        self.features = feature_names(adapter)
        self.inputs = (*self.net.inputs, *self.features)

    def forward(self, *feeds: Tensor) -> Tensor:
        given = named(self.inputs, feeds)
        features = [given[name] for name in self.features]
        return self.net.run(given, given["ctx"], down_intrablock_additional_residuals=features)


def feature_names(adapter: Any) -> tuple[str, ...]:
    """feature_0, feature_1, ...: one for each of a `T2IAdapter`'s blocks."""
    return tuple(f"feature_{k}" for k in range(len(adapter.adapter.body)))
