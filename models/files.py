"""Files of a bundle: their SHA-256, safetensors opened with the remedy where they fail, writing whole or not at all."""

import hashlib
import os
from pathlib import Path
from typing import Any

from .errors import BundleError

PARTIAL = ".partial"
"""Ending of a file in the making."""


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_safetensors(path: Path) -> Any:
    """What `safetensors.safe_open` gives, to be used by `with`: `keys()`, `get_tensor(name)`.

    Errors: `BundleError` where the file is of another kind, missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    if path.suffix.lower() != ".safetensors":
        raise BundleError(f"{path} is not a safetensors file; convert it: a pickle may run code")
    if not path.is_file():
        raise BundleError(f"{path} does not exist; name a .safetensors file")
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path} cannot be read as safetensors ({error}); download it again") from error


def write_whole(path: Path, content: Any) -> None:
    """Write bytes (or a buffer) beside `path`, then move them there: a reader sees the old file or the new, never half.

    Errors: `OSError`; the part written so far is removed.
    """
    beside = path.with_name(path.name + PARTIAL)
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
