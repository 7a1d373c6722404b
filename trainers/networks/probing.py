"""Runs of a transformer's layers that one layer may replace, found by linear probes (PPCL, Ma et al. 2025).

Every layer has a probe: the affine map that best gives its output from its input. From each layer on, the probes of
more and more layers take the layers' place, and the result is compared with what the layers give, by centred kernel
alignment (CKA, Kornblith et al. 2019). Alignment falls slowly along a run and faster where it ends.

PPCL (arXiv 2511.16156, sections 3.1 and 3.2) ends a run where the fall `cka(u, k-1) - cka(u, k)` is greater than the
one before. Ours, since its own code for this step is not published: a probe has an offset, and is the least-squares
solution, without further training; half of the tokens fit and the other half judge; a fall counts as greater only by
more than `rise`, so that rounding ends no run; alignment must stay at `least`, so that what is not linear makes no run;
and of two streams (picture, text) the worse aligned decides.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from .surgery import Run, stacks_of
from .watch import streams_in, streams_out

States = dict[str, Tensor]
"""Stream ("picture", "text") -> its tokens at one place between layers, [N, D]."""
Probes = dict[str, Callable[[Tensor], Tensor]]
"""Stream -> a layer's affine map of its tokens."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What makes a run: `least` alignment, and the `rise` of its fall that ends one. samples: of the data, each at
    `times` noise levels."""

    least: float = 0.95
    rise: float = 0.01
    samples: int = 8
    times: int = 4


def find_runs(transformer: Any, answer: Callable[[], object], probe: Probe) -> tuple[Run, ...]:
    """The runs of all stacks. answer: evaluates the transformer, once or more.

    Errors: `RecipeError` where there is none, with the best alignment of two neighbours.
    """
    found: list[Run] = []
    best = 0.0
    for stack, count in stacks_of(transformer).items():
        if type(transformer).__name__ == "SD3Transformer2DModel":
            count -= 1  # the last layer gives no text stream
        states = layer_states([transformer.get_submodule(f"{stack}.{k}") for k in range(count)], answer)
        probes = fit_probes(states)
        runs = linear_runs(states, probes, least=probe.least, rise=probe.rise)
        found += [Run(stack, first, last) for first, last in runs]
        best = max([best, *(alignments(states, probes, k, k + 2)[-1] for k in range(count - 1))])
    if not found:
        raise RecipeError(
            f"no two layers in a row are near linear: the best pair is aligned by {best:.3f}, and least is "
            f"{probe.least}; lower least, or name runs yourself"
        )
    return tuple(found)


def layer_states(layers: Sequence[nn.Module], answer: Callable[[], object], most: int = 2048) -> list[States]:
    """What enters the first layer and what leaves each: len(layers) + 1 places, about `most` tokens a call."""
    seen: list[dict[str, list[Tensor]]] = [{} for _ in range(len(layers) + 1)]

    def keep(place: int, streams: States) -> None:
        for name, value in streams.items():
            tokens = value.flatten(0, -2)
            seen[place].setdefault(name, []).append(tokens[:: max(1, len(tokens) // most)].float().cpu())

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        keep(0, streams_in(args, kwargs))

    def leave(place: int) -> Callable[..., None]:
        return lambda module, args, out: keep(place, streams_out(out))

    with ExitStack() as hooks, torch.no_grad():
        hooks.callback(layers[0].register_forward_pre_hook(enter, with_kwargs=True).remove)
        for k, layer in enumerate(layers, start=1):
            hooks.callback(layer.register_forward_hook(leave(k)).remove)
        answer()
    shared = set.intersection(*(set(place) for place in seen))
    return [{name: torch.cat(place[name]) for name in sorted(shared)} for place in seen]


def linear_runs(
    states: Sequence[States], probes: Sequence[Probes], *, least: float, rise: float
) -> list[tuple[int, int]]:
    """Disjoint runs (first, last), both included, of two or more layers."""
    count, found, first = len(probes), [], 0
    while first < count:
        last = _end_of_run(alignments(states, probes, first, count), least, rise) + first
        if last > first:
            found.append((first, last))
        first = max(last, first) + 1
    return found


def _end_of_run(aligned: Sequence[float], least: float, rise: float) -> int:
    """Place of a run's last layer, -1 where not even the first layer is linear."""
    before, fall = 1.0, None
    for k, now in enumerate(aligned):
        if now < least or (fall is not None and (before - now) - fall > rise):
            return k - 1
        before, fall = now, before - now
    return len(aligned) - 1


def fit_probes(states: Sequence[States]) -> list[Probes]:
    """Each layer's probe of each stream."""
    return [{name: affine_fit(x, after[name]) for name, x in before.items()} for before, after in pairwise(states)]


def alignments(states: Sequence[States], probes: Sequence[Probes], first: int, end: int) -> list[float]:
    """CKA of the layers first .. k with their probes in a row, for k = first .. end - 1; of the worse stream."""
    found = []
    taken = {name: value.double() for name, value in states[first].items()}
    for k in range(first, end):
        taken = {name: probes[k][name](x) for name, x in taken.items()}
        found.append(min(cka(x[1::2], states[k + 1][name][1::2]) for name, x in taken.items()))
    return found


def affine_fit(x: Tensor, y: Tensor, ridge: float = 1e-6) -> Callable[[Tensor], Tensor]:
    """x + W x + b nearest to y in squares, fitted on every second token of x [N, D] and y [N, D], in float64."""
    inputs, gain = x[::2].double(), (y - x)[::2].double()
    centre, shift = inputs.mean(0), gain.mean(0)
    inputs = inputs - centre
    gram = inputs.T @ inputs
    gram += (ridge * gram.diagonal().mean()).clamp(min=1e-12) * torch.eye(len(gram), dtype=gram.dtype)
    weights = torch.linalg.solve(gram, inputs.T @ (gain - shift))
    return lambda z: z + (z - centre) @ weights + shift


def cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of tokens [N, D] and [N, E], 0 to 1: `|Y'X|^2 / (|X'X| |Y'Y|)`, centred."""
    x, y = (value.double() - value.double().mean(0) for value in (x, y))
    return float((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()).clamp(min=1e-30))
