"""Embedding loss: samples and data compared in the features of networks with random weights, which never train.

The maximum mean discrepancy of two sets needs no critic that could collapse and sees every mode, so it stands beside
another method's terms ("Efficient Diffusion Distillation via Embedding Loss", 2025).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv2d, silu

from fewstep.models.denoiser import Condition

from ..errors import RecipeError
from ..networks.critics import told_of
from ..parts.objective import Batch, Cast, Metrics, Turn
from ..parts.rollout import Made

SEEDS = 1 << 12
WIDTHS = (0.25, 1.0, 4.0)
"""Of the Gaussian kernels' squares, in units of the mean squared distance."""


@dataclass(frozen=True, kw_only=True)
class RandomNetworks:
    """`count` networks of `depth` layers and `width` channels, drawn anew in every step, the same for all processes."""

    count: int = 4
    width: int = 64
    depth: int = 2

    def __post_init__(self) -> None:
        if min(self.count, self.width, self.depth) < 1:
            raise RecipeError(f"{self.count} random networks of {self.depth} layers, {self.width} wide, see nothing")

    def features(self, x: Tensor, y: Tensor, turn: Turn) -> Iterator[tuple[Tensor, Tensor]]:
        """For each network its features [B, width] of x and y [B, C, ...]: convolutions for maps, else dense layers."""
        rng = torch.Generator().manual_seed(turn.pick(torch.ones(SEEDS)))
        both = torch.cat([x, y]).float()
        for _ in range(self.count):
            h = both if both.ndim == 4 else both.flatten(1)
            for layer in range(self.depth):
                h = _layer(h if layer == 0 else silu(h), self.width, rng)
            h = h.flatten(2).mean(2) if h.ndim == 4 else h
            yield h[: len(x)], h[len(x) :]


def _layer(h: Tensor, width: int, rng: torch.Generator) -> Tensor:
    """A dense layer [B, D], or a convolution of stride 2 on maps [B, C, h, w], of normal weights and biases."""
    taps = (3, 3) if h.ndim == 4 else ()
    weight = torch.randn((width, h.shape[1], *taps), generator=rng)
    weight, bias = (weight / weight[0].numel() ** 0.5).to(h), torch.randn(width, generator=rng).to(h)
    return conv2d(h, weight, bias, stride=2, padding=1) if taps else h @ weight.T + bias


def discrepancy(x: Tensor, y: Tensor, told: Tensor | None, kernel: str) -> Tensor:
    """MMD^2 of the laws of (x, told) and (y, told) by the unbiased U-statistic over pairs of rows; x, y [B, D].

    kernel: "linear", whose MMD is the distance of the means, or "gaussian", a mean over three widths. told [B, E]: the
    rows' conditions, which a further Gaussian kernel compares; None for none.
    """
    count, both = len(x), torch.cat([x, y])
    k = both @ both.T / both.shape[1] if kernel == "linear" else _gaussian(both, WIDTHS)
    each = k[:count, :count] + k[count:, count:] - k[:count, count:] - k[count:, :count]
    if told is not None:
        each = each * _gaussian(told.float(), WIDTHS[:1])
    return (each.sum() - each.diagonal().sum()) / (count * (count - 1))


def _gaussian(rows: Tensor, widths: tuple[float, ...]) -> Tensor:
    """[N, N]: mean over widths of `exp(-|a - b|^2 / (width mean|a - b|^2))`, the mean over all pairs, no gradient."""
    norms = rows.square().sum(1)
    far = (norms[:, None] + norms[None] - 2.0 * rows @ rows.T).clamp(min=0.0)
    scale = far.detach().mean().clamp(min=1e-12)
    return torch.stack([torch.exp(-far / (width * scale)) for width in widths]).mean(0)


@dataclass(frozen=True, kw_only=True)
class EmbeddingLoss:
    """`weight MMD^2` of samples and data, mean over random networks. conditional: of them with their conditions."""

    weight: float
    networks: RandomNetworks = RandomNetworks()
    kernel: str = "gaussian"
    conditional: bool = True

    roles = ()
    whole_batch = True

    def __post_init__(self) -> None:
        if self.kernel not in ("linear", "gaussian"):
            raise RecipeError(f"kernel is {self.kernel!r}; it must be 'linear' or 'gaussian'")

    def loss(self, made: Made, cast: Cast, batch: Batch, turn: Turn) -> tuple[Tensor, Metrics]:
        """Errors: `RecipeError` for a batch of one, which has no pairs."""
        if len(made.x0) < 2:
            raise RecipeError("the embedding loss compares pairs of samples; set batch to 2 or more")
        told = _vector(batch.cond) if self.conditional else None
        each = [discrepancy(a, b, told, self.kernel) for a, b in self.networks.features(made.x0, batch.x0, turn)]
        loss = torch.stack(each).mean()
        return self.weight * loss, {"embedding": float(loss.detach())}


def _vector(cond: Condition) -> Tensor | None:
    return told_of(cond) if "label" in cond or "ctx" in cond else None
