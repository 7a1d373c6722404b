"""Checkpoints: tensors and plain values only, written whole or not at all, read without running code.

A run in one process, or one whose processes hold all weights, keeps `checkpoint.pt`. Sharded weights are kept as each
process has them, a safetensors file each, and are read back by any number of processes.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.models.files import write_whole

from ..errors import CheckpointError
from .ranks import Ranks, is_shard, local

SHARDS = "checkpoint.json"
"""Says where the shards are; a new checkpoint holds from when this names it."""


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write beside, then rename: a crash leaves the previous checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    torch.save(dict(state), beside)
    os.replace(beside, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Errors: `CheckpointError` where there is none or it cannot be read."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; leave out --resume to start anew")
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read ({error}); delete it to start anew") from error
    return state


def has_checkpoint(folder: Path) -> bool:
    return (folder / "checkpoint.pt").is_file() or (folder / SHARDS).is_file()


def keep(folder: Path, plain: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]], ranks: Ranks) -> None:
    """Checkpoint a run. plain: JSON values. tensors: player -> name -> tensor; every process must call."""
    if not ranks.sharded:
        if ranks.first:
            save_checkpoint(folder / "checkpoint.pt", {**plain, "players": {k: dict(v) for k, v in tensors.items()}})
            _tidy(folder, "checkpoint.pt")
        ranks.wait()
        return
    from safetensors.torch import save_file

    own = f"checkpoint-{int(plain['step']):08d}"
    (folder / own).mkdir(parents=True, exist_ok=True)
    mine = {f"{player} {name}": value for player, found in tensors.items() for name, value in found.items()}
    mine = {name: local(value).detach().cpu() for name, value in mine.items() if ranks.first or is_shard(value)}
    save_file({name: value.contiguous().clone() for name, value in mine.items()}, folder / own / f"{ranks.index}")
    shards = sorted(f"{p} {name}" for p, found in tensors.items() for name, value in found.items() if is_shard(value))
    ranks.wait()
    if ranks.first:
        told = {"folder": own, "processes": ranks.count, "shards": shards, "state": dict(plain)}
        write_whole(folder / SHARDS, json.dumps(told, indent=1).encode())
        _tidy(folder, own)
    ranks.wait()


def restore(folder: Path) -> tuple[dict[str, Any], Mapping[str, Mapping[str, Tensor]]]:
    """(plain values, player -> name -> whole tensor), of either kind of checkpoint.

    Errors: `CheckpointError` where there is none or it cannot be read.
    """
    if not (folder / SHARDS).is_file():
        state = load_checkpoint(folder / "checkpoint.pt")
        return state, state["players"]
    try:
        told = json.loads((folder / SHARDS).read_text())
        gathered = _Gathered(folder / told["folder"], int(told["processes"]), frozenset(told["shards"]))
        players = {name.split(" ", 1)[0] for name in gathered.names}
        state = {**told["state"], "players": players}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / SHARDS} cannot be read ({error}); delete it to start anew") from error
    return state, {player: _OfPlayer(gathered, player + " ") for player in players}


class _Gathered:
    """Tensors made whole from the files of all processes, one at a time as they are asked for."""

    def __init__(self, folder: Path, processes: int, shards: frozenset[str]) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            self.files: list[Any] = [safe_open(folder / f"{k}", "pt") for k in range(processes)]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder} lacks a shard ({error}); start anew without --resume") from error
        self.names = frozenset(self.files[0].keys())
        self.shards = shards

    def tensor(self, name: str) -> Tensor:
        """Blocks are sharded along their first axis, in the order of the processes."""
        held = self.files if name in self.shards else self.files[:1]
        return torch.cat([file.get_tensor(name) for file in held]) if len(held) > 1 else held[0].get_tensor(name)


class _OfPlayer(Mapping[str, Tensor]):
    """One player's tensors by their own names."""

    def __init__(self, gathered: _Gathered, prefix: str) -> None:
        self.gathered, self.prefix = gathered, prefix

    def __getitem__(self, name: str) -> Tensor:
        if self.prefix + name not in self.gathered.names:
            raise KeyError(name)
        return self.gathered.tensor(self.prefix + name)

    def __iter__(self) -> Iterator[str]:
        start = len(self.prefix)
        return (name[start:] for name in self.gathered.names if name.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return f"{self.prefix}{name}" in self.gathered.names


def _tidy(folder: Path, kept: str) -> None:
    """Only one checkpoint is left."""
    if kept == "checkpoint.pt":
        (folder / SHARDS).unlink(missing_ok=True)
    else:
        (folder / "checkpoint.pt").unlink(missing_ok=True)
    for old in folder.glob("checkpoint-*"):
        if old.name != kept:
            shutil.rmtree(old)
