"""Networks of diffusers' classes behind flat tensor signatures, the same for sampling, training and export.

Each has `inputs` and `outputs`: the names of the tensors that `forward` takes, in order, and gives.

Shapes: x [B, C, h, w]; t [B] float; ctx [B, L, D]; pooled [B, P]; size_ids [B, K]; w [B] guidance scale (1 means none);
picture [B, 3, H, W] in [-1, 1]; edge [B, 3, H, W] in [0, 1]; scale [B] ControlNet strength.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .denoiser import Condition, Network, expand
from .guidance_adapter import FIELD as GUIDANCE_ADAPTER
from .negative_adapter import FIELD as NEGATIVE_ADAPTER


class DenoiserNet(nn.Module):
    """`UNet2DConditionModel` as (x, t, ctx[, pooled, size_ids][, w][, residual_0 ...]) -> raw F.

    control: whether it takes a ControlNet's outputs, down blocks in order and the middle last. `inputs` names what
    `forward` takes.
    """

    outputs = ("f",)

    def __init__(self, unet: Any, *, control: bool = False) -> None:
        super().__init__()
        self.unet = unet
        self.adapted = GUIDANCE_ADAPTER in unet.config
        self.avoids = NEGATIVE_ADAPTER in unet.config
        self.takes_w = self.adapted or unet.config.time_cond_proj_dim is not None
        count = residual_count(unet) if control else 0
        self.inputs = (
            "x", "t", "ctx", *size_inputs(unet), *(("w",) if self.takes_w else ()),
            *(f"residual_{k}" for k in range(count)),
        )  # fmt: skip

    def steered(self) -> "DenoiserNet":
        """The same weights with a ControlNet's inputs."""
        return DenoiserNet(self.unet, control=True).train(self.training)

    def forward(self, *feeds: Tensor) -> Tensor:
        given = named(self.inputs, feeds)
        settings: dict[str, Any] = {}
        residuals = tuple(value for name, value in given.items() if name.startswith("residual_"))
        if residuals:
            settings["down_block_additional_residuals"] = residuals[:-1]
            settings["mid_block_additional_residual"] = residuals[-1]
        return self.run(given, given["ctx"], **settings)

    def run(self, given: Mapping[str, Tensor], ctx: Any, **settings: Any) -> Tensor:
        """The U-Net's call. ctx: what its cross-attentions read; settings: further arguments of its `forward`."""
        if self.avoids and not isinstance(ctx, tuple):
            ctx = (ctx, self.unet.avoided.to(ctx.dtype).expand(ctx.shape[0], -1, -1))
        if self.adapted:
            ctx = (ctx, self.unet.guidance_tokens(given["w"], given["t"], ctx))
        elif self.takes_w:
            embedded = guidance_embedding(given["w"], self.unet.config.time_cond_proj_dim)
            settings["timestep_cond"] = embedded.to(given["x"].dtype)
        settings |= size_settings(given)
        out: Tensor = self.unet(given["x"], given["t"], ctx, return_dict=False, **settings)[0]
        return out


class ControlNet(nn.Module):
    """`ControlNetModel` as (x, t, ctx[, pooled, size_ids], edge, scale) -> residuals, down blocks, the middle last."""

    def __init__(self, controlnet: Any) -> None:
        super().__init__()
        self.controlnet = controlnet
        self.inputs = ("x", "t", "ctx", *size_inputs(controlnet), "edge", "scale")
        self.outputs = tuple(f"residual_{k}" for k in range(residual_count(controlnet)))

    def forward(self, *feeds: Tensor) -> tuple[Tensor, ...]:
        given = named(self.inputs, feeds)
        down, mid = self.controlnet(
            given["x"], given["t"], given["ctx"], given["edge"], return_dict=False, **size_settings(given)
        )
        return tuple(r * expand(given["scale"], r) for r in (*down, mid))


def size_inputs(network: Any) -> tuple[str, ...]:
    """What a U-Net or ControlNet of SDXL takes beside the others': the pooled text and the picture's size."""
    return ("pooled", "size_ids") if network.config.addition_embed_type == "text_time" else ()


def size_settings(given: Mapping[str, Tensor]) -> dict[str, Any]:
    """Feeds of `size_inputs` as diffusers' `forward` takes them; nothing where there are none."""
    if "size_ids" not in given:
        return {}
    return {"added_cond_kwargs": {"text_embeds": given["pooled"], "time_ids": given["size_ids"]}}


def residual_count(unet: Any) -> int:
    """How many residuals a U-Net's down blocks and middle take from a ControlNet."""
    return 2 + sum(len(block.resnets) + len(block.downsamplers or ()) for block in unet.down_blocks)


def named(inputs: tuple[str, ...], feeds: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    """Positional feeds by name.

    Errors: `ValueError` naming the first feed that is missing or the number there should be.
    """
    given = {name: feed for name, feed in zip(inputs, feeds, strict=False) if feed is not None}
    if missing := [name for name in inputs if name not in given]:
        raise ValueError(f"this network takes {', '.join(inputs)}: pass {missing[0]}")
    if len(feeds) > len(inputs):
        raise ValueError(f"this network takes {', '.join(inputs)}; it was given {len(feeds)} tensors")
    return given


def same_batch(first: Tensor, *others: Tensor) -> None:
    """Tell an exporter that the batches are one: attention code asks, and would fix the batch of the example."""
    for other in others:
        torch._check(other.shape[0] == first.shape[0])


class Decoder(nn.Module):
    """Latent [B, C, h, w] as the denoiser sees it -> picture [B, 3, H, W] in [-1, 1]."""

    inputs, outputs = ("latent",), ("picture",)

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.scale = float(vae.config.scaling_factor)
        self.shift = float(getattr(vae.config, "shift_factor", None) or 0.0)

    def forward(self, latent: Tensor) -> Tensor:
        out: Tensor = self.vae.decode(latent / self.scale + self.shift, return_dict=False)[0]
        return out


class Encoder(nn.Module):
    """Picture [B, 3, H, W] in [-1, 1] -> latent as the denoiser sees it (the mean, where the encoder has a spread)."""

    inputs, outputs = ("picture",), ("latent",)

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.scale = float(vae.config.scaling_factor)
        self.shift = float(getattr(vae.config, "shift_factor", None) or 0.0)

    def forward(self, picture: Tensor) -> Tensor:
        (out,) = self.vae.encode(picture, return_dict=False)
        latent: Tensor = out if isinstance(out, Tensor) else out.mode()
        return (latent - self.shift) * self.scale


class TextEncoder(nn.Module):
    """Token ids [B, L] int64 -> ctx [B, L, D]."""

    inputs, outputs = ("ids",), ("ctx",)

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.text_encoder(ids)[0]
        return out


class MaskedText(nn.Module):
    """A text encoder told which tokens are real: ids, mask [B, L] int64 -> ctx [B, L, D], ctx_mask [B, L] float.

    layer: which of its hidden states is taken, -2 being the one before the last layer; None for its output (T5).
    """

    inputs, outputs = ("ids", "mask"), ("ctx", "ctx_mask")

    def __init__(self, text_encoder: Any, *, layer: int | None = None) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.layer = layer

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        same_batch(ids, mask)
        found = self.text_encoder(ids, attention_mask=mask, output_hidden_states=self.layer is not None)
        ctx: Tensor = found[0] if self.layer is None else found.hidden_states[self.layer]
        return ctx, mask.to(ctx.dtype)


def guidance_embedding(w: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of w - 1 (the LCM paper's omega), [B] -> [B, dim], float32; diffusers' formula."""
    half = dim // 2
    rate = torch.exp(torch.arange(half, dtype=torch.float32, device=w.device) * (-9.210340371976184 / (half - 1)))
    angle = (w.float() - 1.0)[:, None] * 1000.0 * rate[None]
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class TextEncoderXL(nn.Module):
    """SDXL's two CLIP encoders: ids, ids_2 [B, L] -> ctx [B, L, D + D2] before the last layer; pooled [B, P]."""

    inputs, outputs = ("ids", "ids_2"), ("ctx", "pooled")

    def __init__(self, first: Any, second: Any) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, ids: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor]:
        one = self.first(ids, output_hidden_states=True)
        two = self.second(ids_2, output_hidden_states=True)
        return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1), two[0]


def as_network(net: Any, control: ControlNet | None = None) -> Network:
    """The `Network` of a `Denoiser`: reads what `net.inputs` names, and `edge`, `control_scale`, from the condition."""
    steered = net if control is None else net.steered()

    def run(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        given: dict[str, Tensor] = {**cond, "x": x, "t": t.to(device=x.device, dtype=torch.float32)}
        if control is None or "edge" not in cond:
            return net(*(given.get(name) for name in net.inputs))  # type: ignore[no-any-return]
        given["scale"] = cond.get("control_scale", torch.ones(x.shape[0], device=x.device))
        residuals = control(*(given[name] for name in control.inputs))
        given |= dict(zip(control.outputs, residuals, strict=True))
        return steered(*(given.get(name) for name in steered.inputs))  # type: ignore[no-any-return]

    return run
