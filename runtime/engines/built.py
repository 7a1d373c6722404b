"""Which engines of native code were built on this machine: remembered outside of bundles, whose makers write the rest.

Opening such an engine runs what is in its files. A bundle's own digests and costs say nothing of who made them, so
"auto" takes those alone whose files an export of this user has written here.
"""

import os
from contextlib import suppress
from pathlib import Path

from .manifest import Manifest

NATIVE = frozenset({"aoti", "aoti-bf16", "onnx-tensorrt", "tensorrt", "tensorrt-fp16", "tensorrt-bf16"})
"""Engines whose files are programs for this process: AOTInductor's shared libraries, and TensorRT's plans, which may
carry plugin libraries. `onnx-tensorrt` keeps plans that no manifest has beside its graphs, so it is never remembered.
"""


def record() -> Path:
    """The folder of what was built: `fewstep/built` of `XDG_STATE_HOME`, by default `~/.local/state`."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "fewstep" / "built"


def remember(manifest: Manifest) -> None:
    """Note an engine's files by their digests; where nothing can be written there the engine is opened by name."""
    folder = record()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        for graph in manifest.roles.values():
            (folder / graph.sha256).touch()


def built_here(manifest: Manifest) -> bool:
    """Whether all of an engine's files were built here; files are held against these digests before they are opened."""
    noted = record()
    known = all(graph.sha256.isalnum() and (noted / graph.sha256).is_file() for graph in manifest.roles.values())
    return bool(manifest.roles) and known and manifest.engine != "onnx-tensorrt"
