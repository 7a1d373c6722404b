"""What a method holds in memory while it trains, found by watching one small step of it.

Weights, moments and averages are counted, of every network that can be reached from the method: a critic's eye or a
reward's judge that stands behind a function is in memory too. What a step adds, activations and gradients, is seen at
two small batches, operation by operation: at each the bytes alive grow linearly with the batch, so each is continued to
the whole batch and the largest is the peak. (The peak of a small batch is elsewhere than that of a large one: at the
last gradient, not at the first.) Work space inside an operation is not seen.
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..parts.objective import Batch, Turn
from .loop import Method
from .player import Player

SMALL = (2, 4)
"""Batches that are watched: these of samples, or of groups where a method has groups."""


@dataclass(frozen=True)
class Memory:
    """Bytes: weights of all networks and the other tensors that stay; moments of AdamW; the most that a step adds."""

    weights: int
    moments: int
    step: int

    @property
    def total(self) -> int:
        return self.weights + self.moments + self.step

    def __str__(self) -> str:
        parts = ("weights and averages", self.weights), ("optimiser", self.moments), ("a step at its peak", self.step)
        told = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in parts)
        return f"memory per process: {self.total / 2**20:,.0f} MiB ({told})"


def memory_of(method: Method, batch: Batch, *, rows: int, beside: object, bf16: bool, seed: int = 0,
    accumulate: int = 1,
) -> Memory:  # fmt: skip
    """Of a method on batches of `rows` samples a pass. batch: a few samples, or a few groups of them. beside: what else
    of the run stays in memory; its networks count."""
    weights = weight_bytes(method, beside)
    trained = {p.name: sum(w.nbytes for w in p.weights) for p in method.players}
    unit = int(getattr(getattr(method, "objective", None), "group", 1))
    step = 0
    for player in method.players:
        seen = [
            (size, _watched(method, player, _first(batch, size), bf16, seed))
            for size in sorted({min(size * unit, len(batch.x0)) for size in SMALL})
        ]  # fmt: skip
        gradients = trained[player.name] if accumulate > 1 else 0
        step = max(step, gradients + _continued(seen, rows))
    return Memory(weights, 2 * sum(trained.values()), step)


def weight_bytes(*holders: object) -> int:
    """Bytes of the weights and buffers of all networks that these hold; what is shared counts once."""
    kept: dict[int, int] = {}
    for module in modules_in(*holders):
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(kept.values())


def modules_in(*holders: object) -> Iterator[nn.Module]:
    """Each module that these lead to, once: through attributes, containers, and what functions close over.

    A module's own attributes are followed too, since what it holds in a tuple is none of its submodules.
    """
    seen: dict[int, object] = {}
    left: list[object] = list(holders)
    while left:
        thing = left.pop()
        if id(thing) in seen or isinstance(thing, (str, bytes, int, float, Tensor, type, ModuleType)):
            continue
        seen[id(thing)] = thing  # kept, as the number of a thing that is gone may come again
        if isinstance(thing, nn.Module):
            yield thing
        left += _held_by(thing)


def _held_by(thing: object) -> Iterable[object]:
    if isinstance(thing, dict):
        return thing.values()
    if isinstance(thing, (list, tuple, set, frozenset)):
        return thing
    if isinstance(thing, MethodType):
        return thing.__self__, thing.__func__
    if isinstance(thing, partial):
        return thing.func, thing.args, thing.keywords
    if isinstance(thing, FunctionType):
        return *(_content(cell) for cell in thing.__closure__ or ()), *(thing.__defaults__ or ())
    return getattr(thing, "__dict__", {}).values()


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # a name that its function has not given a value yet
        return None


def _watched(method: Method, player: Player, batch: Batch, bf16: bool, seed: int) -> list[int]:
    """Bytes that one turn has added, after each of its operations."""
    for other in method.players:
        other.gradients(other is player)
    player.forget()
    turn = Turn.of(seed, 0, 1, player.name, batch.x0.device)
    turn.share_dropout()
    live = _Live()
    with live:
        with torch.autocast(batch.x0.device.type, torch.bfloat16, enabled=bf16):
            loss, _ = method.loss(player.name, batch, turn)
        player.learn(loss)
        del loss
    player.forget()
    for other in method.players:
        other.gradients(True)
    return live.series


def _continued(seen: list[tuple[int, list[int]]], rows: int) -> int:
    """The peak at `rows` samples, from the series at one or two small batches."""
    if len(seen) == 1:
        size, series = seen[0]
        return round(max(series) * rows / size)
    (small, low), (large, high) = seen
    if len(low) != len(high):  # an operation more or less, as libraries choose by size: the same share of the way
        low = [low[k * len(low) // len(high)] for k in range(len(high))]
    slope = (rows - small) / (large - small)
    return max(round(a + slope * (b - a)) for a, b in zip(low, high, strict=True))


def peak_bytes(device: torch.device) -> int:
    """The most that this process has held on the device since it began; on the CPU everything it held, code too."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage also counts what the process that started this one held
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Live(TorchDispatchMode):
    """Bytes of the tensors made under it that are alive, after each operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.series: list[int] = [0]
        self.known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        for tensor in tree_leaves((args, kwargs or {})):
            if isinstance(tensor, Tensor):
                self.known.setdefault(tensor.untyped_storage()._cdata, 0)  # it was there before
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        self.series.append(self.now)
        return out

    def _note(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self.known:
            self.known[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.known.pop(key, 0)


def _first(batch: Batch, rows: int) -> Batch:
    def cut(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: tensor[:rows] for name, tensor in value.items()}
        return value if value is None else value[:rows]

    return Batch(**{each.name: cut(getattr(batch, each.name)) for each in fields(batch)})
