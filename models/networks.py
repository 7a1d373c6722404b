"""Networks of diffusers' classes behind flat tensor signatures, the same for sampling, training and export.

Shapes: x [B, C, h, w]; t [B] float; ctx [B, L, D]; w [B] guidance scale (1 means none);
picture [B, 3, H, W] in [-1, 1]; edge [B, 3, H, W] in [0, 1]; scale [B] ControlNet strength.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .denoiser import Condition, Network, expand


class DenoiserNet(nn.Module):
    """`UNet2DConditionModel` as (x, t, ctx[, w][, residuals...]) -> raw F.

    Residuals are the ControlNet's outputs, down blocks in order and the middle last.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        self.takes_w = unet.config.time_cond_proj_dim is not None

    def forward(self, x: Tensor, t: Tensor, ctx: Tensor, w: Tensor | None = None, *residuals: Tensor) -> Tensor:
        time_cond = None
        if self.takes_w:
            if w is None:
                raise ValueError("this network takes the guidance scale: pass w [B]")
            time_cond = guidance_embedding(w, self.unet.config.time_cond_proj_dim).to(x.dtype)
        extra: dict[str, Any] = {}
        if residuals:
            extra = {
                "down_block_additional_residuals": tuple(residuals[:-1]),
                "mid_block_additional_residual": residuals[-1],
            }
        out: Tensor = self.unet(x, t, ctx, timestep_cond=time_cond, return_dict=False, **extra)[0]
        return out


class ControlNet(nn.Module):
    """`ControlNetModel` as (x, t, ctx, edge, scale) -> residuals, down blocks in order and the middle last."""

    def __init__(self, controlnet: Any) -> None:
        super().__init__()
        self.controlnet = controlnet

    def forward(self, x: Tensor, t: Tensor, ctx: Tensor, edge: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        down, mid = self.controlnet(x, t, ctx, edge, return_dict=False)
        return tuple(r * expand(scale, r) for r in (*down, mid))


class Decoder(nn.Module):
    """Latent [B, C, h, w] as the denoiser sees it -> picture [B, 3, H, W] in [-1, 1]."""

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

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.scale = float(vae.config.scaling_factor)
        self.shift = float(getattr(vae.config, "shift_factor", None) or 0.0)

    def forward(self, picture: Tensor) -> Tensor:
        out = self.vae.encode(picture)
        latent: Tensor = out.latents if hasattr(out, "latents") else out.latent_dist.mode()
        return (latent - self.shift) * self.scale


class TextEncoder(nn.Module):
    """Token ids [B, L] int64 -> ctx [B, L, D]."""

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.text_encoder(ids)[0]
        return out


def guidance_embedding(w: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of w - 1 (the LCM paper's omega), [B] -> [B, dim], float32; diffusers' formula."""
    half = dim // 2
    rate = torch.exp(torch.arange(half, dtype=torch.float32, device=w.device) * (-9.210340371976184 / (half - 1)))
    angle = (w.float() - 1.0)[:, None] * 1000.0 * rate[None]
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def as_network(net: DenoiserNet, control: ControlNet | None = None) -> Network:
    """The `Network` of a `Denoiser`: reads `ctx`, and `w`, `edge`, `control_scale` where given, from the condition."""

    def run(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        time = t.to(device=x.device, dtype=torch.float32)
        residuals: tuple[Tensor, ...] = ()
        if control is not None and "edge" in cond:
            scale = cond.get("control_scale", torch.ones(x.shape[0], device=x.device))
            residuals = control(x, time, cond["ctx"], cond["edge"], scale)
        return net(x, time, cond["ctx"], cond.get("w"), *residuals)  # type: ignore[no-any-return]

    return run
