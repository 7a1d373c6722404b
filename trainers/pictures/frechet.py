"""Frechet distance between two sets of pictures, seen through a feature network (Heusel et al. 2017, FID).

Both sets are taken for Gaussians in feature space: `|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`. The arithmetic is
torchmetrics' own. The figure falls with more pictures, so compare only figures of equally many.
"""

import torch
from torch import Tensor, nn


def frechet_distance(real: Tensor, made: Tensor) -> float:
    """Distance between two sets of features [N, D] and [M, D].

    Errors: ValueError where a set has fewer than two pictures or the widths differ.
    """
    if real.ndim != 2 or made.ndim != 2 or real.shape[1] != made.shape[1]:
        raise ValueError(
            f"features are [N, D] and [M, D] of one width; these are {list(real.shape)}, {list(made.shape)}"
        )
    if min(len(real), len(made)) < 2:
        raise ValueError(f"a Frechet distance needs two pictures of each kind; there are {len(real)} and {len(made)}")
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_AsTheyAre(real.shape[1])).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(made.double(), real=False)
    return max(0.0, float(metric.compute()))


class _AsTheyAre(nn.Module):
    """Stands where torchmetrics wants a network: its input is features already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features
