"""Networks of another shape: U-Net blocks cut, channels narrowed, transformer layers dropped or added.

What comes out is of diffusers' own class with a config that says all of it, so it loads wherever diffusers does. A
shape that the class has no config for is refused.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fewstep.models.altered import remade

from ..errors import RecipeError

Rename = Callable[[str], str | None]
"""A weight's name in the smaller network -> its name in the larger; None where it is new."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What of a `UNet2DConditionModel` stays (BK-SDM, Kim et al. 2023).

    middle: keep the middle block. layers: residual-attention pairs kept per stage, fine to coarse, of the encoder; the
    decoder keeps one more in each; None keeps all. stages: stages kept, counted from the finest; None keeps all.
    BK-SDM-base is layers (1, 1, 1, 1); small is base without the middle; tiny is small without the coarsest stage.
    """

    middle: bool = True
    layers: tuple[int, ...] | None = None
    stages: int | None = None


def cut_unet(unet: Any, cut: Cut) -> Any:
    """The U-Net with the cut's blocks, each with the weights it had.

    Of a decoder stage's pairs the first and the last stay, since they read what enters the stage on either side; of an
    encoder stage's, the first. Errors: `RecipeError` naming the field that asks for what is not there.
    """
    depth = len(unet.config.down_block_types)
    stages = depth if cut.stages is None else cut.stages
    if not 1 <= stages <= depth:
        raise RecipeError(f"cut: stages is {cut.stages}; this U-Net has {depth}, keep 1 to {depth} of them")
    had = _per_stage(unet.config.layers_per_block, depth)
    layers = had[:stages] if cut.layers is None else cut.layers
    if len(layers) != stages or any(not 0 <= now <= was for now, was in zip(layers, had, strict=False)):
        raise RecipeError(
            f"cut: layers is {list(layers)}; these stages have {list(had[:stages])}, keep as many or fewer"
        )
    if stages < depth and cut.middle and unet.config.mid_block_type is not None:
        raise RecipeError("cut: the middle block belongs to the coarsest stage; without that stage set middle to false")
    channels = (unet.config.block_out_channels[0], *unet.config.block_out_channels)
    for k, now in enumerate(layers):
        if now == 0 and channels[k] != channels[k + 1]:
            raise RecipeError(
                f"cut: layers[{k}] is 0, but that stage goes from {channels[k]} to {channels[k + 1]} channels; keep 1"
            )
    changes = _shortened(unet.config, stages) | {"layers_per_block": tuple(layers)}
    if not cut.middle:
        changes["mid_block_type"] = None
    return rebuilt(unet, changes, _names_after(had, layers, depth - stages))


def kept_pairs(had: int, kept: int) -> tuple[int, ...]:
    """Which of a decoder stage's `had` pairs the `kept` are: the first ones and the last."""
    return (*range(kept - 1), had - 1) if kept > 1 else (0,)


def narrow_unet(unet: Any, width: float) -> Any:
    """A U-Net of `width` times the channels, each weight the leading corner of the wider one's.

    Errors: `RecipeError` where a width leaves no multiple of the norm's groups and the heads.
    """
    groups, heads = unet.config.norm_num_groups, unet.config.attention_head_dim
    unit = groups * heads // _common(groups, heads) if isinstance(heads, int) else groups
    channels = tuple(max(unit, unit * round(width * c / unit)) for c in unet.config.block_out_channels)
    if not 0.0 < width < 1.0 or channels == tuple(unet.config.block_out_channels):
        raise RecipeError(
            f"width is {width}; channels {list(unet.config.block_out_channels)} come in units of {unit}, so it changes "
            "nothing or leaves nothing: choose another between 0 and 1"
        )
    return rebuilt(unet, {"block_out_channels": channels}, lambda name: name, corner=True)


SILENT = ("attn1.to_out.0.", "attn2.to_out.0.", "ff.net.2.")
"""The last weights of a transformer layer's three branches: where these are zero it gives back what it got."""


def deepen_unet(unet: Any, extra: Sequence[int]) -> Any:
    """A U-Net with so many more transformer layers in each attention of a stage, fine to coarse; of the last, also in
    the middle block's. It answers as it did: each new layer is the one before it, silenced.

    Errors: `RecipeError` where the stages are not as many, or nothing is added.
    """
    depth = len(unet.config.down_block_types)
    had = _per_stage(unet.config.transformer_layers_per_block, depth)
    if len(extra) != depth or min(extra) < 0 or not any(extra):
        raise RecipeError(
            f"extra_layers is {list(extra)}; this U-Net has {depth} stages: give each 0 or more, the finest first"
        )
    if unet.config.reverse_transformer_layers_per_block is not None or not all(isinstance(n, int) for n in had):
        raise RecipeError(
            "extra_layers adds to stages whose encoder and decoder have as many transformer layers; this U-Net has "
            "others: leave it out"
        )

    def before(key: str) -> str:
        """Of a new layer's weight: that of the last layer that its attention had."""
        head, _, rest = key.partition(".transformer_blocks.")
        if not rest:
            return key
        side, stage = head.split(".")[:2]
        level = int(stage) if side == "down_blocks" else depth - 1 - (int(stage) if side == "up_blocks" else 0)
        number, _, tail = rest.partition(".")
        return f"{head}.transformer_blocks.{min(int(number), had[level] - 1)}.{tail}"

    out = rebuilt(unet, {"transformer_layers_per_block": tuple(map(sum, zip(had, extra, strict=True)))}, before)
    with torch.no_grad():
        for key, weight in out.named_parameters():
            if before(key) != key and any(last in key for last in SILENT):
                weight.zero_()
    return out


STACKS: Mapping[str, Mapping[str, str]] = {
    "PixArtTransformer2DModel": {"transformer_blocks": "num_layers"},
    "SanaTransformer2DModel": {"transformer_blocks": "num_layers"},
    "SD3Transformer2DModel": {"transformer_blocks": "num_layers"},
    "FluxTransformer2DModel": {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"},
    "ZImageTransformer2DModel": {"layers": "n_layers"},
}
"""Per class: each stack of equal layers, and the config field that counts them."""


def keep_layers(transformer: Any, layers: Sequence[int], stack: str = "transformer_blocks") -> Any:
    """The transformer with these layers of a stack, in this order of positions (a layer may stand for its neighbours).

    Errors: `RecipeError` for a class without such a stack, layers that do not rise, or a last layer that is special.
    """
    name = type(transformer).__name__
    field = STACKS.get(name, {}).get(stack)
    if field is None:
        known = ", ".join(f"{k}.{s}" for k, v in STACKS.items() for s in v)
        raise RecipeError(f"{name}.{stack} is no stack whose layers can be dropped; these are: {known}")
    count = getattr(transformer.config, field)
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= count:
        raise RecipeError(f"layers is {list(layers)}; give rising numbers from 0 to {count - 1}")
    changes: dict[str, Any] = {field: len(layers)}
    if name == "SD3Transformer2DModel":
        if layers[-1] != count - 1:
            raise RecipeError(
                f"layers ends with {layers[-1]}; SD3's last layer, {count - 1}, has no text stream: keep it"
            )
        dual = set(transformer.config.dual_attention_layers or ())
        changes["dual_attention_layers"] = tuple(k for k, old in enumerate(layers) if old in dual)

    def before(key: str) -> str:
        head, _, rest = key.partition(f"{stack}.")
        if head or not rest:
            return key
        number, _, tail = rest.partition(".")
        return f"{stack}.{layers[int(number)]}.{tail}"

    return rebuilt(transformer, changes, before)


def layers_after(count: int, intervals: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Layers that stay when each interval (first, last), both included, is replaced by its middle layer (PPCL)."""
    gone = {k for first, last in intervals for k in range(first, last + 1) if k != (first + last) // 2}
    return tuple(k for k in range(count) if k not in gone)


@dataclass(frozen=True)
class Run:
    """Layers `first` to `last` of a stack, both included, in whose place one layer stands, a copy of the middle one."""

    stack: str
    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.stack}.{self.first}-{self.last}"

    @staticmethod
    def read(text: str) -> "Run":
        """`transformer_blocks.3-5`. Errors: `RecipeError` for anything else."""
        found = re.fullmatch(r"(\w+)\.(\d+)-(\d+)", text)
        if found is None or int(found[2]) >= int(found[3]):
            raise RecipeError(f"runs holds {text!r}; write STACK.FIRST-LAST, as transformer_blocks.3-5")
        return Run(found[1], int(found[2]), int(found[3]))


def stacks_of(transformer: Any) -> dict[str, int]:
    """The stacks whose layers can be dropped, and how many each has.

    Errors: `RecipeError` for a class without any.
    """
    name = type(transformer).__name__
    if name not in STACKS:
        raise RecipeError(
            f"{name} has no stack of like layers; those of {', '.join(STACKS)} can be dropped. For a U-Net use "
            "bk-sdm, edgefusion, a-sdm or vdmini"
        )
    return {stack: int(transformer.config[field]) for stack, field in STACKS[name].items()}


def replace_runs(transformer: Any, runs: Sequence[Run]) -> Any:
    """The transformer with one layer in place of each run.

    Errors: `RecipeError` for a run that is not there, overlaps another, or takes in a last layer that is special.
    """
    counts = stacks_of(transformer)
    for run in runs:
        if run.stack not in counts or run.last >= counts[run.stack]:
            able = ", ".join(f"{stack}.0-{count - 1}" for stack, count in counts.items())
            raise RecipeError(f"runs holds {run}; this {type(transformer).__name__} has {able}")
    for stack, count in counts.items():
        mine = sorted((run.first, run.last) for run in runs if run.stack == stack)
        if any(b[0] <= a[1] for a, b in pairwise(mine)):
            raise RecipeError(f"runs {', '.join(map(str, runs))} overlap; a layer can go once")
        if type(transformer).__name__ == "SD3Transformer2DModel" and mine and mine[-1][1] == count - 1:
            raise RecipeError(f"runs holds {stack}.{mine[-1][0]}-{count - 1}; SD3's last layer is special: keep it")
        if mine:
            transformer = keep_layers(transformer, layers_after(count, mine), stack)
    return transformer


def layer_twins(runs: Sequence[Run]) -> dict[str, Run]:
    """Of what `replace_runs` makes: the name of each layer that stands for a run -> the run."""
    found = {}
    for run in runs:
        before = sum(other.last - other.first for other in runs if other.stack == run.stack and other.last < run.first)
        found[f"{run.stack}.{run.first - before}"] = run
    return found


def rebuilt(network: Any, changes: Mapping[str, Any], before: Rename, *, corner: bool = False) -> Any:
    """A network of the changed config; each weight is that of its old name, or new where the old one has another shape.

    corner: take the leading corner of a larger weight instead.
    """
    # diffusers' private notes would say that a changed value is a default, and put the default back
    settings = {name: value for name, value in network.config.items() if not name.startswith("_")}
    out = remade(type(network), {**settings, **changes})
    old, new = network.state_dict(), out.state_dict()
    for key, weight in new.items():
        name = before(key)
        found = old.get(name) if name is not None else None
        if found is None:
            continue
        if found.shape == weight.shape:
            new[key] = found.clone()
        elif corner:
            new[key] = _corner(found, weight)
    out.load_state_dict(new)
    return out


def _names_after(had: Sequence[int], layers: Sequence[int], dropped: int) -> Rename:
    """Old names of a cut U-Net's weights. `dropped` stages are gone from the coarse end, so the decoder counts anew."""
    stages = len(layers)

    def before(key: str) -> str:
        parts = key.split(".")
        if parts[0] == "up_blocks":
            stage = stages - 1 - int(parts[1])
            parts[1] = str(int(parts[1]) + dropped)
            if parts[2] in ("resnets", "attentions"):
                parts[3] = str(kept_pairs(had[stage] + 1, layers[stage] + 1)[int(parts[3])])
        return ".".join(parts)

    return before


_STAGEWISE = ("block_out_channels", "down_block_types", "attention_head_dim", "num_attention_heads",
              "cross_attention_dim", "transformer_layers_per_block", "only_cross_attention")  # fmt: skip


def _shortened(config: Any, stages: int) -> dict[str, Any]:
    """Config fields with one entry per stage, cut at the coarse end; `up_block_types` starts there."""
    out = {name: tuple(config[name][:stages]) for name in _STAGEWISE if isinstance(config[name], (list, tuple))}
    out["up_block_types"] = tuple(config.up_block_types[-stages:])
    return out


def _per_stage(value: int | Sequence[int], depth: int) -> tuple[int, ...]:
    return (value,) * depth if isinstance(value, int) else tuple(value)


def _corner(wide: Tensor, narrow: Tensor) -> Tensor:
    """The leading corner; inputs that were dropped would have added to the sum, so the rest is scaled to its spread."""
    out = wide[tuple(slice(0, n) for n in narrow.shape)].clone()
    if narrow.ndim > 1 and narrow.shape[1] < wide.shape[1]:
        out *= (wide.shape[1] / narrow.shape[1]) ** 0.5
    return out


def _common(a: int, b: int) -> int:
    return int(torch.gcd(torch.tensor(a), torch.tensor(b)))
