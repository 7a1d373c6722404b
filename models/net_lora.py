"""LoRAs that stay beside the weights, mixed row by row: every row of a batch may have its own weights of each.

y = W x + sum_k scale_k B_k A_k x, the low-rank parts of all registered LoRAs in one graph, so rows of any mix share a
call; a merged LoRA (`fewstep.models.lora`) costs nothing, but has an engine of its own per mix. Shapes: lora_scale
[B, K], one per registered LoRA in the order of their names, 0 for none.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from .cross_attention import sharing_copy
from .errors import BundleError
from .files import open_safetensors
from .networks import DenoiserNet, named
from .pipeline_folder import read_config

CLASS = "LoraStack"
Pair = tuple[Tensor, Tensor]
"""(A, B) of one layer: [r, in] and [out, r], or such convolutions; B holds the LoRA's own scale."""


@dataclass(frozen=True)
class LoraStack:
    """The component `loras/` of a bundle: layer -> pair, for each of `names`."""

    names: tuple[str, ...]
    layers: tuple[dict[str, Pair], ...]


def lora_names(folder: Path) -> tuple[str, ...]:
    """The names that a bundle registers, in order.

    Errors: `BundleError` where the component's settings are not readable.
    """
    names = read_config(folder, "").get("names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BundleError(f"{folder}/config.json names no LoRAs; register them again")
    return tuple(names)


def load_loras(folder: Path) -> LoraStack:
    """The component `loras/` of a bundle.

    Errors: `BundleError` where a file is missing or unreadable.
    """
    names = lora_names(folder)
    layers = []
    for name in names:
        with open_safetensors(folder / f"{name}.safetensors") as file:
            found = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
        layers.append({key[:-2]: (found[key], found[f"{key[:-2]}.b"]) for key in found if key.endswith(".a")})
    return LoraStack(names, tuple(layers))


@dataclass
class _Call:
    """lora_scale [B, K] of the call that runs: what the layers read that no U-Net hands down to them."""

    scale: Tensor | None = None


class LoraDenoiser(nn.Module):
    """`DenoiserNet` with lora_scale as a further input."""

    outputs = ("f",)

    def __init__(self, unet: Any, stack: LoraStack) -> None:
        super().__init__()
        clone = sharing_copy(unet)
        self.call = _Call()
        for layer in sorted({name for pairs in stack.layers for name in pairs}):
            above, _, last = layer.rpartition(".")
            parent = clone.get_submodule(above)
            pairs = {k: found[layer] for k, found in enumerate(stack.layers) if layer in found}
            setattr(parent, last, _Mixed(getattr(parent, last), pairs, self.call))
        self.net = DenoiserNet(clone)
        self.inputs = (*self.net.inputs, "lora_scale")

    def forward(self, *feeds: Tensor) -> Tensor:
        given = named(self.inputs, feeds)
        self.call.scale = given["lora_scale"]
        try:
            return self.net.run(given, given["ctx"])
        finally:
            self.call.scale = None


class _Mixed(nn.Module):
    """A layer and the low-rank pairs of the LoRAs that change it, by their places among the names."""

    def __init__(self, layer: Any, pairs: dict[int, Pair], call: _Call) -> None:
        super().__init__()
        self.layer, self.call, self.places = layer, call, tuple(pairs)
        self.down = nn.ParameterList([nn.Parameter(a, requires_grad=False) for a, _ in pairs.values()])
        self.up = nn.ParameterList([nn.Parameter(b, requires_grad=False) for _, b in pairs.values()])

    def forward(self, x: Tensor, *more: Any, **settings: Any) -> Tensor:
        out: Tensor = self.layer(x, *more, **settings)
        scales = self.call.scale
        if scales is None:
            raise RuntimeError("a layer with LoRAs was called outside its network")
        for k, down, up in zip(self.places, self.down, self.up, strict=True):
            scale = scales[:, k].reshape(-1, *([1] * (out.ndim - 1))).to(out.dtype)
            out = out + scale * self._low_rank(x, down, up)
        return out

    def _low_rank(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        if down.ndim == 2:
            return functional.linear(functional.linear(x, down), up)
        inner = functional.conv2d(x, down, None, self.layer.stride, self.layer.padding, self.layer.dilation)
        return functional.conv2d(inner, up)
