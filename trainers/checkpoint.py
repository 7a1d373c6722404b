"""Checkpoints: tensors and plain values only, written whole or not at all, read without running code."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError


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
