"""A second time: denoisers that are told where a jump lands beside where it begins (CTM, flow maps, shortcut models).

Behind the embedding of the first time a projection of the second's waves is added, zero at first. A network of any
family says it by `fewstep_second_time` in its config. diffusers does not know that word and would leave the projection
out, so such a folder is for this library, or for an exported engine. Shapes: s [B], native time of the path.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import BundleError
from .networks import named
from .paths import CLEAN_VP
from .pipeline_folder import SECOND_TIME

WAVES = 128
EMBEDDERS = (
    "time_embedding", "adaln_single.emb.timestep_embedder", "time_text_embed.timestep_embedder",
    "time_embed.emb.timestep_embedder", "time_embed.timestep_embedder", "t_embedder",
)  # fmt: skip
"""Where diffusers' classes embed their time: U-Nets, PixArt, SD3 and FLUX, SANA, SANA-Sprint, Z-Image."""


@dataclass
class _Call:
    """s [B] of the call that runs: what the embedding reads that no network hands down to it."""

    s: Tensor | None = None


class SecondTime(nn.Module):
    """What is added to the embedding [B, D] of the first time.

    scale: of its waves, which turn by a radian per unit and slower; 1 where native time counts to 1000.
    """

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.call, self.scale = _Call(), scale
        self.project = nn.Linear(2 * WAVES, width, bias=False)
        nn.init.zeros_(self.project.weight)

    def forward(self) -> Tensor:
        s = self.call.s
        if s is None:
            raise RuntimeError("a network with a second time was called without it")
        weight = self.project.weight
        at = s.to(weight.device).float().clamp(min=CLEAN_VP) * self.scale
        rate = torch.exp(torch.arange(WAVES, dtype=torch.float32, device=weight.device) * (-math.log(10000.0) / WAVES))
        angle = at[:, None] * rate
        out: Tensor = self.project(torch.cat([angle.sin(), angle.cos()], dim=1).to(weight.dtype))
        return out


def add_second_time(network: Any, scale: float) -> Any:
    """Give a network of diffusers' classes a second time in place, and say so in its config; nothing changes at first.

    Errors: `BundleError` for a class whose embedding of time is not known, and for a scale that is none.
    """
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not scale > 0:
        raise BundleError(f"{SECOND_TIME} is {scale!r}; it must be a number above 0, the scale of native time")
    modules = dict(network.named_modules())
    embedder = next((modules[name] for name in EMBEDDERS if name in modules), None)
    if embedder is None:
        raise BundleError(f"{type(network).__name__} embeds its time in a way that takes no second one")
    last = [layer for layer in embedder.modules() if isinstance(layer, nn.Linear)][-1]
    second = SecondTime(last.out_features, float(scale))
    embedder.second_time = second.to(last.weight.device, last.weight.dtype)
    embedder.register_forward_hook(_add)
    network.register_to_config(**{SECOND_TIME: float(scale)})
    return network


def _add(embedder: Any, given: Any, out: Tensor) -> Tensor:
    added: Tensor = embedder.second_time()
    return out + added.to(out.dtype)


class TwoTimes(nn.Module):
    """A denoiser's network of any family and role, with `s` as a further input behind the others."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net
        self.inputs, self.outputs = (*net.inputs, "s"), net.outputs
        self.call = next(part.call for part in net.modules() if isinstance(part, SecondTime))

    def steered(self) -> "TwoTimes":
        """The same weights with a ControlNet's inputs."""
        return TwoTimes(self.net.steered()).train(self.training)

    def forward(self, *feeds: Tensor) -> Tensor:
        self.call.s = named(self.inputs, feeds)["s"]
        try:
            out: Tensor = self.net(*feeds[:-1])
        finally:
            self.call.s = None
        return out


def with_second_time(net: Any) -> Any:
    """The network as it is asked: with `s` where there is one inside that takes a second time."""
    return TwoTimes(net) if any(isinstance(part, SecondTime) for part in net.modules()) else net
