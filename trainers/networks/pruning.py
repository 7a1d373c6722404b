"""Which parts of a U-Net can go: blocks ranked by what their absence changes.

This looks at a network that answers a few inputs; nothing is trained and nothing is removed here.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from .surgery import Cut

Answer = Callable[[], Tensor]
"""The network's output on inputs that stay the same from call to call."""


def removal_scores(answer: Answer, removals: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Relative change of the answer, `|out - full| / |full|`, when each part is gone; least first (VDMini).

    removals: name -> a context manager that takes the part out while it is open.
    """
    with torch.no_grad():
        full = answer().float()
        scores = {}
        for name, removed in removals.items():
            with removed():
                scores[name] = float((answer().float() - full).norm() / full.norm())
    return dict(sorted(scores.items(), key=lambda item: item[1]))


@contextmanager
def bypassed(module: nn.Module, keep: Callable[..., Any]) -> Any:
    """While open the module answers `keep(*args, **kwargs)` in place of its own output."""

    def answer(module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        return keep(out, *args, **kwargs)

    handle = module.register_forward_hook(answer, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def passing(module: nn.Module) -> Callable[[], Any]:
    """A removal: the module hands its first input on. Tuples keep their form, as a transformer layer of two streams."""

    def keep(out: Any, *args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else kwargs["hidden_states"]
        if isinstance(out, tuple) and len(out) == 2 and "encoder_hidden_states" in kwargs:
            return kwargs["encoder_hidden_states"], first  # diffusers' joint layers give (text, picture)
        return (first, *out[1:]) if isinstance(out, tuple) else first

    return lambda: bypassed(module, keep)


def unet_removals(unet: Any) -> dict[str, tuple[Cut, Callable[[], Any]]]:
    """Everything that `surgery.cut_unet` can take out of a U-Net in one move, each with what stands for its absence.

    "middle"; "stage k": the last pair of stage k in encoder and decoder.
    """
    depth = len(unet.config.down_block_types)
    per_stage = unet.config.layers_per_block
    had = [per_stage] * depth if isinstance(per_stage, int) else list(per_stage)
    found: dict[str, tuple[Cut, Callable[[], Any]]] = {}
    if unet.mid_block is not None:
        found["middle"] = (Cut(middle=False), passing(unet.mid_block))
    for k in range(depth):
        down, up = unet.down_blocks[k], unet.up_blocks[depth - 1 - k]
        parts = [*_pair(down, had[k] - 1), *_pair(up, had[k])]
        if had[k] > 0 and all(_keeps_shape(part) for part in parts if hasattr(part, "conv1")):
            layers = tuple(n - (i == k) for i, n in enumerate(had))
            found[f"stage {k}"] = (Cut(layers=layers), _all_passing(parts))
    return found


def ranked_cut(unet: Any, answer: Answer, remove: int) -> tuple[Cut, dict[str, float]]:
    """The cut that takes out the `remove` parts whose absence changes the answer least, and every part's score.

    Errors: `RecipeError` where there are fewer parts than that.
    """
    parts = unet_removals(unet)
    if not 1 <= remove <= len(parts):
        raise RecipeError(f"remove is {remove}; this U-Net has {len(parts)} removable parts: {', '.join(parts)}")
    scores = removal_scores(answer, {name: removal for name, (_, removal) in parts.items()})
    chosen = [parts[name][0] for name in list(scores)[:remove]]
    cuts = [cut.layers for cut in chosen if cut.layers is not None]
    layers = tuple(min(column) for column in zip(*cuts, strict=True)) if cuts else None
    return Cut(middle=all(cut.middle for cut in chosen), layers=layers), scores


def _pair(block: Any, k: int) -> list[nn.Module]:
    """The k-th residual block of a stage and its attention."""
    attentions = getattr(block, "attentions", ())
    return [block.resnets[k], *([attentions[k]] if len(attentions) else [])]


def _keeps_shape(resnet: Any) -> bool:
    """A decoder's residual block also takes the skip in; without it the first half of its input is what goes on."""
    return bool(resnet.out_channels <= resnet.in_channels)


def _all_passing(parts: Sequence[nn.Module]) -> Callable[[], Any]:
    @contextmanager
    def removed() -> Any:
        with ExitStack() as stack:
            for part in parts:
                stack.enter_context(bypassed(part, _leading))
            yield

    return removed


def _leading(out: Any, *args: Any, **kwargs: Any) -> Any:
    """As many leading channels of the input as the output has: a decoder's input is [what came, skip]."""
    first = args[0] if args else kwargs["hidden_states"]
    value = out[0] if isinstance(out, tuple) else out
    kept = first[:, : value.shape[1]]
    return (kept, *out[1:]) if isinstance(out, tuple) else kept
