"""What the stages of two networks give, side by side: the features that a smaller network learns from a larger one.

A stage is a module that both networks have under one name (`down_blocks.0`, `mid_block`), or a layer that stands for a
run of the larger one's. Where the smaller one lacks it, or gives another shape, there is nothing to compare and it is
left out. Layers of two streams give "NAME" (picture) and "NAME text".
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..parts.objective import Switch
from .surgery import Run, kept_pairs, layer_twins

Seen = dict[str, Tensor]
"""Stage -> its output in the network's last evaluation."""


@dataclass(frozen=True)
class Twin:
    """Where in the larger network a stage's work begins and ends: the same module, but for a run of layers."""

    first: str
    last: str


def stages_of(network: Any) -> tuple[str, ...]:
    """The names whose outputs are compared: a U-Net's blocks, or a transformer's layers."""
    found = []
    for name, module in network.named_children():
        if isinstance(module, nn.ModuleList) and name.endswith("blocks"):
            found += [f"{name}.{k}" for k in range(len(module))]
    return (*found, "mid_block") if getattr(network, "mid_block", None) is not None else tuple(found)


def stage_pairs(smaller: Any, larger: Any, runs: Sequence[Run] = ()) -> dict[str, Twin]:
    """Stages of the smaller network -> those of the larger that do the same work.

    Decoder stages are counted from the finest, so that a network without the coarsest stage still finds its own. With
    runs only the layers that stand for them count: the others are the larger network's own.
    """
    if runs:
        return {
            name: Twin(f"{run.stack}.{run.first}", f"{run.stack}.{run.last}") for name, run in layer_twins(runs).items()
        }
    pairs = {}
    theirs = set(stages_of(larger))
    for name in stages_of(smaller):
        twin = name
        if name.startswith("up_blocks."):
            twin = f"up_blocks.{int(name.split('.')[1]) + len(larger.up_blocks) - len(smaller.up_blocks)}"
        if twin in theirs:
            pairs[name] = Twin(twin, twin)
    return pairs


def watch_both(smaller: Any, larger: Any, pairs: Mapping[str, Twin]) -> dict[str, Seen]:
    """Note what the stages give from now on, in the roles `student` and `teacher`, under the smaller one's names."""
    return {
        "student": watch(smaller, {name: name for name in pairs}),
        "teacher": watch(larger, {twin.last: name for name, twin in pairs.items()}),
    }


def watch(network: Any, names: Mapping[str, str]) -> Seen:
    """Note the outputs of stages from now on: module name -> the name it is noted under."""
    seen: Seen = {}
    for name, noted in names.items():
        network.get_submodule(name).register_forward_hook(_noting(seen, noted))
    return seen


def lead(smaller: Any, larger: Any, pairs: Mapping[str, Twin]) -> Switch:
    """While the switch is on, each stage of the smaller network is fed what its twin was fed in the larger one's last
    evaluation.

    So every stage learns its own work alone, and no stage the errors of those before it (A-SDM, PPCL). The larger
    network must be evaluated first. A decoder stage of fewer pairs takes the skips of the pairs it kept.
    """
    fed: dict[str, dict[str, Any]] = {}
    switch = Switch()
    for mine, theirs in pairs.items():
        twin, stage = larger.get_submodule(theirs.first), smaller.get_submodule(mine)
        twin.register_forward_pre_hook(_keeping(fed, mine), with_kwargs=True)
        stage.register_forward_pre_hook(_feeding(fed, mine, _skips(stage, twin), switch), with_kwargs=True)
    return switch


def streams_in(args: Any, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """What enters a transformer's layer: its picture tokens, and "text" where it may be a stream."""
    found = {"picture": args[0] if args else kwargs["hidden_states"]}
    text = kwargs.get("encoder_hidden_states")
    return found if text is None else {**found, "text": text}


def streams_out(out: Any) -> dict[str, Tensor]:
    """What leaves a layer or a stage: diffusers' joint layers give (text, picture), a U-Net's (picture, skips)."""
    if not isinstance(out, tuple):
        return {"picture": out}
    if len(out) == 2 and isinstance(out[1], Tensor):
        return {"picture": out[1]} | ({} if out[0] is None else {"text": out[0]})
    return {"picture": out[0]}


def _noting(seen: Seen, name: str) -> Callable[..., None]:
    def note(module: nn.Module, args: Any, out: Any) -> None:
        for stream, value in streams_out(out).items():
            seen[name if stream == "picture" else f"{name} {stream}"] = value

    return note


_INPUTS = ("hidden_states", "temb")
"""What a U-Net's block is given by position, in order; diffusers gives the middle block both so, the others by name. Of
a transformer's layer only the first counts."""
_STREAMS = (*_INPUTS, "encoder_hidden_states", "res_hidden_states_tuple")
"""What differs between two networks on their way through the same inputs; the rest is the same for both."""


def _keeping(fed: dict[str, dict[str, Any]], name: str) -> Callable[..., None]:
    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        fed[name] = {key: _open(value) for key, value in {**dict(zip(_INPUTS, args, strict=False)), **kwargs}.items()}

    return keep


def _open(value: Any) -> Any:
    """Asking for a gradient that nobody reads: torch 2.13's group norm breaks the process on channels-last inputs whose
    gradient is not asked for."""
    if isinstance(value, tuple):
        return tuple(_open(item) for item in value)
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().requires_grad_()
    return value


def _feeding(
    fed: dict[str, dict[str, Any]], name: str, skips: Callable[[Any], Any], switch: Switch
) -> Callable[..., Any]:
    def feed(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not switch.on:
            return args, kwargs
        theirs = fed[name]
        first = tuple(theirs[key] for key, _ in zip(_INPUTS, args, strict=False))
        args = (*first, *args[len(first) :])
        kwargs = {**kwargs, **{key: theirs[key] for key in _STREAMS if key in kwargs}}
        if "res_hidden_states_tuple" in kwargs:
            kwargs["res_hidden_states_tuple"] = skips(kwargs["res_hidden_states_tuple"])
        return args, kwargs

    return feed


def _skips(stage: Any, twin: Any) -> Callable[[Any], Any]:
    """Of the twin's skips, coarse ones last, those of the pairs that the stage kept."""
    kept = kept_pairs(len(twin.resnets), len(stage.resnets)) if hasattr(twin, "resnets") else ()
    return lambda skips: tuple(skips[len(skips) - 1 - k] for k in reversed(kept))
