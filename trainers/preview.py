"""Pictures of a student in training: the sampler of its spec, run by the same coefficients that serve it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from fewstep.models.denoiser import Condition, Network, guide, times
from fewstep.models.spec import SamplerSpec
from fewstep.runtime.samplers import path_start, updates


@torch.no_grad()
def sample(
    net: Network, spec: SamplerSpec, steps: int, cond: Condition, shape: Sequence[int], *, w: float, seed: int = 0,
    uncond: Condition | None = None,
) -> Tensor:  # fmt: skip
    """Latents [B, C, ...] by `x <- A x + B F + C z`. With `uncond` each step is guided by two evaluations."""
    rng = torch.Generator().manual_seed(seed)
    device = next(iter(cond.values())).device

    def noise() -> Tensor:
        return torch.randn(tuple(shape), generator=rng).to(device)

    x = noise() * path_start(spec.path)
    scale = times(w, x)
    for t, update in updates(spec, steps):
        f = net(x, times(t, x), {**cond, "w": scale})
        if uncond is not None and w != 1.0:
            f = guide(net(x, times(t, x), {**uncond, "w": scale}), f, w)
        x = update.a * x + update.b * f.float()
        if update.c:
            x = x + update.c * noise()
    return x


def save_grid(rows: Sequence[Tensor], decoder: nn.Module, path: Path) -> None:
    """One row of pictures per tensor of latents [B, C, h, w]."""
    with torch.no_grad():
        pictures = torch.stack([decoder(row).float() for row in rows])
    pixels = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
    count, across, _, height, width = pixels.shape
    sheet = pixels.permute(0, 3, 1, 4, 2).reshape(count * height, across * width, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet.numpy()).save(path)
