"""How much pictures of one prompt differ from seed to seed. A student that draws every seed alike has lost it.

The distance of two pictures is Euclidean in feature space (`trainers.pictures.features`). As the caption leaves much
open (places, unsaid sizes, background), real scenes of a caption have a spread of their own; it is the unit: 1.0 is as
diverse as the data, 0.0 is one picture for all seeds.
"""

import torch
from torch import Tensor


def spread(features: Tensor) -> float:
    """Mean distance between two seeds of a prompt, averaged over prompts. features: [prompts, seeds, D], seeds >= 2."""
    if features.ndim != 3 or features.shape[1] < 2:
        raise ValueError(f"features are [prompts, seeds, D] with at least two seeds; these are {list(features.shape)}")
    seeds = features.shape[1]
    apart = torch.cdist(features.double(), features.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return float(apart.sum(dim=(1, 2)).mean() / (seeds * (seeds - 1)))


def diversity(made: Tensor, real: Tensor) -> float:
    """Spread of made pictures over the spread of real ones of the same prompts; each [prompts, seeds, D]."""
    return spread(made) / spread(real)
