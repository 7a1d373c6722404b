"""Pictures of a student in training: the sampler of its spec, run by the same coefficients that serve it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from fewstep.models.denoiser import Condition, Network, guide, times
from fewstep.models.paths import told_time
from fewstep.models.spec import SamplerSpec
from fewstep.runtime.sampling.samplers import start_scale, updates


@torch.no_grad()
def sample(
    net: Network, spec: SamplerSpec, steps: int, cond: Condition, shape: Sequence[int], *, w: float, seed: int = 0,
    uncond: Condition | None = None,
) -> Tensor:  # fmt: skip
    """Latents [B, C, ...] by `x <- A x + B F + C z + D m`. With `uncond` each step is guided by two evaluations."""
    rng = torch.Generator().manual_seed(seed)
    device = next(iter(cond.values())).device

    def noise() -> Tensor:
        return torch.randn(tuple(shape), generator=rng).to(device)

    rows = updates(spec, steps)
    x = noise() * start_scale(spec, rows[0][0])
    scale, estimate = times(w, x).float(), torch.zeros(())
    for t, update in rows:
        told = {"w": scale, "s": times(told_time(spec.path, update.lands), x)}
        f = net(x, times(t, x), {**cond, **told})
        if uncond is not None and w != 1.0:
            f = guide(net(x, times(t, x), {**uncond, **told}), f, w)
        f = f.float()
        remembered, keep = estimate, update.keep
        if keep is not None:
            estimate = keep[0] * x + keep[1] * f
        x = update.a * x + update.b * f
        if update.c:
            x = x + update.c * noise()
        if update.d:
            x = x + update.d * remembered
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
