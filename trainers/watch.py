"""What the stages of two networks give, side by side: the features that a smaller network learns from a larger one.

A stage is a module that both networks have under one name (`down_blocks.0`, `mid_block`, `transformer_blocks.3`). Where
the smaller one lacks it, or gives another shape, there is nothing to compare and it is left out.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .surgery import kept_pairs

Seen = dict[str, Tensor]
"""Stage -> its output in the network's last evaluation."""


def stages_of(network: Any) -> tuple[str, ...]:
    """The names whose outputs are compared: a U-Net's blocks, or a transformer's layers."""
    found = []
    for name, module in network.named_children():
        if isinstance(module, nn.ModuleList) and name.endswith("blocks"):
            found += [f"{name}.{k}" for k in range(len(module))]
    return (*found, "mid_block") if getattr(network, "mid_block", None) is not None else tuple(found)


def stage_pairs(smaller: Any, larger: Any) -> dict[str, str]:
    """Stages of the smaller network -> those of the larger that do the same work.

    Decoder stages are counted from the finest, so that a network without the coarsest stage still finds its own.
    """
    pairs = {}
    theirs = set(stages_of(larger))
    for name in stages_of(smaller):
        twin = name
        if name.startswith("up_blocks."):
            twin = f"up_blocks.{int(name.split('.')[1]) + len(larger.up_blocks) - len(smaller.up_blocks)}"
        if twin in theirs:
            pairs[name] = twin
    return pairs


def watch(network: Any, names: Mapping[str, str]) -> Seen:
    """Note the outputs of stages from now on: module name -> the name it is noted under."""
    seen: Seen = {}
    for name, noted in names.items():
        network.get_submodule(name).register_forward_hook(_noting(seen, noted))
    return seen


def lead(smaller: Any, larger: Any, pairs: Mapping[str, str]) -> None:
    """From now on each stage of the smaller network is fed what its twin was fed in the larger one's last evaluation.

    So every stage learns its own work alone, and the stages are assembled afterwards (A-SDM). The larger network must
    be evaluated first. A decoder stage of fewer pairs takes the skips of the pairs it kept.
    """
    fed: dict[str, dict[str, Any]] = {}
    for mine, theirs in pairs.items():
        twin, stage = larger.get_submodule(theirs), smaller.get_submodule(mine)
        twin.register_forward_pre_hook(_keeping(fed, mine), with_kwargs=True)
        stage.register_forward_pre_hook(_feeding(fed, mine, _skips(stage, twin)), with_kwargs=True)


def _noting(seen: Seen, name: str) -> Callable[..., None]:
    def note(module: nn.Module, args: Any, out: Any) -> None:
        seen[name] = out[0] if isinstance(out, tuple) else out

    return note


_INPUTS = ("hidden_states", "temb")
"""What a block is given by position, in order; diffusers gives the middle block both so, the others by name."""


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


def _feeding(fed: dict[str, dict[str, Any]], name: str, skips: Callable[[Any], Any]) -> Callable[..., Any]:
    def feed(module: nn.Module, args: Any, kwargs: Any) -> Any:
        theirs = fed[name]
        args = tuple(theirs[key] for key, _ in zip(_INPUTS, args, strict=False))
        kwargs = {**kwargs, **{key: theirs[key] for key in (*_INPUTS, "res_hidden_states_tuple") if key in kwargs}}
        if "res_hidden_states_tuple" in kwargs:
            kwargs["res_hidden_states_tuple"] = skips(kwargs["res_hidden_states_tuple"])
        return args, kwargs

    return feed


def _skips(stage: Any, twin: Any) -> Callable[[Any], Any]:
    """Of the twin's skips, coarse ones last, those of the pairs that the stage kept."""
    kept = kept_pairs(len(twin.resnets), len(stage.resnets)) if hasattr(twin, "resnets") else ()
    return lambda skips: tuple(skips[len(skips) - 1 - k] for k in reversed(kept))
