"""What was measured, beside the code it was measured on. A status is never typed: it is read from here.

One JSON file per kind in `evidence_files/`, each keyed by a digest of the sources that define the mathematics. When one
of them changes the key is stale and the evidence counts as none, until it is made anew:

    python -m fewstep.trainers.oracle        writes evidence_files/oracle.json
"""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

ROOMS = Path(__file__).resolve().parents[1]
FOLDER = Path(__file__).parent / "evidence_files"
SOURCES = {"models": ("analytic", "denoiser", "paths", "predictions", "spec"), "runtime/sampling": ("samplers",)}
PACKAGES = ("parts", "networks", "loop", "distribution", "objectives", "recipes", "oracle")
"""Of the trainers, what decides what a recipe computes, and what checks it."""


def sources() -> list[tuple[str, str]]:
    """(room, module) of each, in order."""
    below = [(room, name) for room, names in SOURCES.items() for name in names]
    own = [
        (package, file.stem) for package in PACKAGES for file in sorted((Path(__file__).parent / package).glob("*.py"))
    ]
    return below + [(f"trainers/{package}", name) for package, name in own]


@cache
def source_digest() -> str:
    """SHA-256 over `sources`, names and contents; line endings do not count."""
    digest = hashlib.sha256()
    for room, name in sources():
        text = (ROOMS / room / f"{name}.py").read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{room}/{name}:{len(text)}:".encode() + text)
    return digest.hexdigest()


def read_evidence(kind: str) -> dict[str, Any] | None:
    """The evidence of a kind ("oracle"), or None where there is none or its sources have changed since."""
    try:
        data = json.loads((FOLDER / f"{kind}.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    return data if isinstance(data, dict) and data.get("digest") == source_digest() else None


def write_evidence(kind: str, data: dict[str, Any]) -> Path:
    """Write evidence of a kind under the digest of the present sources; returns the file."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{kind}.json"
    path.write_text(json.dumps({"digest": source_digest(), **data}, indent=1, sort_keys=True) + "\n")
    return path


def oracle_status(recipe: str) -> str:
    """ "passed", "failed" or "none" for one recipe."""
    evidence = read_evidence("oracle")
    status = "none" if evidence is None else evidence["recipes"].get(recipe, {}).get("status", "none")
    return str(status)
