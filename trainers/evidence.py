"""What was measured, beside the code it was measured on. A status is never typed: it is read from here.

One JSON file per kind in `evidence_files/`, each keyed by a digest of the sources that define the mathematics. When one
of them changes the key is stale and the evidence counts as none, until it is made anew:

    python -m fewstep.trainers.oracle        writes evidence_files/oracle.json
"""

import hashlib
import json
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

ROOMS = Path(__file__).resolve().parents[1]
FOLDER = Path(__file__).parent / "evidence_files"
SOURCES = {"models": ("analytic", "denoiser", "paths", "predictions", "spec"), "runtime": ("samplers",)}
APART = (
    "bands*", "bench_*", "budget", "checkpoint", "commands", "compliance", "data", "demo", "dial", "distill",
    "diversity", "engine_quality", "errors", "evidence", "family", "features", "frechet", "grids", "headlines",
    "health", "methods_page", "picture_score", "pictures", "plane*", "plot", "preview", "quality", "ranks",
    "recipes_report", "scenes", "student_bundle", "surgery", "teacher*", "tiny_decoder", "__init__",
)  # fmt: skip
"""The files that decide what a recipe computes, and those that check it: of the trainers all but those `APART`."""


def sources() -> list[tuple[str, str]]:
    """(room, module) of each, in order."""
    own = sorted(path.stem for path in Path(__file__).parent.glob("*.py"))
    apart = [(room, name) for room, names in SOURCES.items() for name in names]
    return apart + [("trainers", name) for name in own if not any(fnmatch(name, kind) for kind in APART)]


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
