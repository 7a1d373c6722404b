"""One graph from token ids to pixels, for requests of a fixed step count: text, denoiser, updates and decoder in one.

It saves the calls between them and what each costs around its arithmetic. The row-by-row form stays the definition: the
updates' numbers and the noise are inputs, so no sampler is written into the graph.
"""

from typing import Any

from torch import Tensor, nn

from .denoiser import expand
from .networks import named


class TextToPixels(nn.Module):
    """(ids, ..., x [B, C, h, w][, size_ids][, w], t[, s], a, b [B, N][, z [B, N - 1, C, h, w]]) -> picture.

    Step k of N is `x <- a_k x + b_k F(x, t_k) + z_k`, z_k the noise already scaled; the last has none.
    """

    outputs = ("picture",)

    def __init__(self, text: Any, denoiser: Any, decoder: nn.Module, *, steps: int = 1) -> None:
        super().__init__()
        self.text, self.denoiser, self.decoder, self.steps = text, denoiser, decoder, steps
        self.times = tuple(name for name in ("t", "s") if name in denoiser.inputs)
        rest = tuple(name for name in denoiser.inputs if name not in (*text.outputs, *self.times))
        self.inputs = (*text.inputs, *rest, *self.times, "a", "b", *(("z",) if steps > 1 else ()))

    def forward(self, *feeds: Tensor) -> Tensor:
        given = named(self.inputs, feeds)
        words = self.text(*(given[name] for name in self.text.inputs))
        words = words if isinstance(words, tuple) else (words,)
        given |= dict(zip(self.text.outputs, words, strict=True))
        x = given["x"]
        for k in range(self.steps):
            now = {**given, "x": x, **{name: given[name][:, k] for name in self.times}}
            f = self.denoiser(*(now[name] for name in self.denoiser.inputs))
            x = expand(given["a"][:, k], f) * x + expand(given["b"][:, k], f) * f
            if k < self.steps - 1:
                x = x + given["z"][:, k]
        return self.decoder(x)  # type: ignore[no-any-return]
