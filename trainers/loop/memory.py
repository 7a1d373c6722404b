"""What a method holds in memory while it trains, found by watching one small step of it.

Weights, moments and averages are counted. What a step adds, activations and gradients, is seen at two small batches,
operation by operation: at each the bytes alive grow linearly with the batch, so each is continued to the whole batch
and the largest is the peak. (The peak of a small batch is elsewhere than that of a large one: at the last gradient, not
at the first.) Work space inside an operation is not seen.
"""

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..networks.bank import Voice
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


def memory_of(method: Method, batch: Batch, *, rows: int, networks: Iterable[nn.Module], bf16: bool, seed: int = 0,
    accumulate: int = 1,
) -> Memory:  # fmt: skip
    """Of a method on batches of `rows` samples a pass. batch: a few samples, or a few groups of them. networks: those
    beside the players that stay in memory."""
    kept: dict[int, torch.UntypedStorage] = {}
    for module in (*networks, *(m for p in method.players for m in (p.module, *p.averages.values()))):
        kept |= {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in _tensors(module)}
    weights = sum(storage.nbytes() for storage in kept.values())
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


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    """Weights and buffers, also of the network behind a voice."""
    for part in module.modules():
        if isinstance(part, Voice):
            yield from _tensors(part._outside[0].network)
    yield from module.parameters()
    yield from module.buffers()


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
