"""One graph from token ids to pixels, for one-step students: text encoders, denoiser, update and decoder in one.

It saves the calls between them and what each costs around its arithmetic. The row-by-row form stays the definition: the
update's numbers are inputs, so no sampler is written into the graph.
"""

from typing import Any

from torch import Tensor, nn

from .denoiser import expand
from .networks import named


class TextToPixels(nn.Module):
    """(ids, ..., x [B, C, h, w], t [B][, size_ids][, w], a [B], b [B]) -> picture of the latent `a x + b F`."""

    outputs = ("picture",)

    def __init__(self, text: Any, denoiser: Any, decoder: nn.Module) -> None:
        super().__init__()
        self.text, self.denoiser, self.decoder = text, denoiser, decoder
        rest = tuple(name for name in denoiser.inputs if name not in text.outputs)
        self.inputs = (*text.inputs, *rest, "a", "b")

    def forward(self, *feeds: Tensor) -> Tensor:
        given = named(self.inputs, feeds)
        words = self.text(*(given[name] for name in self.text.inputs))
        words = words if isinstance(words, tuple) else (words,)
        given |= dict(zip(self.text.outputs, words, strict=True))
        f = self.denoiser(*(given[name] for name in self.denoiser.inputs))
        latent = expand(given["a"], f) * given["x"] + expand(given["b"], f) * f
        return self.decoder(latent)  # type: ignore[no-any-return]
