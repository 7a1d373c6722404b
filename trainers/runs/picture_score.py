"""How far a student's pictures are from its data: the Frechet distance of the scenes benchmark, on a few samples."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.bundle import Bundle
from fewstep.models.networks import as_network
from fewstep.models.spec import SamplerSpec

from ..parts.objective import Batch
from ..pictures.data import LatentSource
from ..pictures.features import load_features
from ..pictures.frechet import frechet_distance
from ..pictures.preview import sample


@dataclass(frozen=True)
class PictureScore:
    """Features of the data, and the conditions that samples are made under."""

    teacher: Bundle
    spec: SamplerSpec
    batches: tuple[Batch, ...]
    decoder: nn.Module
    eye: nn.Module
    real: Tensor

    @torch.no_grad()
    def __call__(self, network: Any, counts: tuple[int, ...]) -> float:
        """Mean over step counts of the distance between `network`'s samples and the data, both as decoded."""
        net = as_network(self.teacher.family.denoiser(network, False).eval())
        found = []
        for steps in counts:
            made = []
            for k, batch in enumerate(self.batches):
                w = self.spec.guidance.default
                made.append(sample(net, self.spec, steps, batch.cond, batch.x0.shape, w=w, seed=k))
            found.append(frechet_distance(self.real, self._seen(made)))
        return sum(found) / len(found)

    def _seen(self, latents: list[Tensor]) -> Tensor:
        return torch.cat([self.eye(self.decoder(x).float()).cpu() for x in latents])


@torch.no_grad()
def picture_score(teacher: Bundle, spec: SamplerSpec, source: LatentSource, samples: int) -> PictureScore:
    """Of at least `samples` pictures, in batches of the training data's that no step of training draws."""
    count = -(-samples // source.size)
    batches = tuple(source.joint(-100 - k) for k in range(count))
    eye, decoder = load_features().to(source.device), teacher.decoder().to(source.device)
    blank = PictureScore(teacher, spec, batches, decoder, eye, torch.zeros(0))
    real = blank._seen([batch.x0 for batch in batches])
    return PictureScore(teacher, spec, batches, decoder, eye, real)
