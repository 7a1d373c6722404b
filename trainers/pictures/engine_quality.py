"""What an engine does to pictures: its compliance and Frechet distance beside torch's, kept in its manifest.

Both are measured on the same prompts and seeds, so their difference is the engine's doing and not the draw's.
"""

from collections.abc import Sequence
from typing import Any

from fewstep.models.bundle import Bundle
from fewstep.models.spec import QualityRow
from fewstep.runtime.engines.budget import breaches, with_quality
from fewstep.runtime.engines.manifest import read_manifest, write_manifest
from fewstep.runtime.errors import EngineUnavailable


def changes(found: Sequence[QualityRow], reference: Sequence[QualityRow]) -> dict[str, dict[str, float]]:
    """Per step count: the engine's figures, and the engine's less torch's.

    Errors: ValueError where the step counts differ.
    """
    table = {}
    for row, exact in zip(found, reference, strict=True):
        if (row.steps, row.guidance, row.pictures) != (exact.steps, exact.guidance, exact.pictures):
            raise ValueError(f"a row of {row.steps} steps was held against one of {exact.steps}")
        table[str(row.steps)] = {
            "compliance": row.compliance,
            "frechet": row.frechet,
            "compliance_change": round(row.compliance - exact.compliance, 4),
            "frechet_change": round(row.frechet - exact.frechet, 4),
        }
    return table


def keep_quality(
    bundle: Bundle, kind: str, found: Sequence[QualityRow], reference: Sequence[QualityRow], seed: int
) -> list[str]:
    """Write an engine's quality into its manifest, where it decides with the budget whether the engine is verified.

    Returns what passes the budget, in words; empty where nothing does.

    Errors: `EngineUnavailable` where there is no such engine or its folder cannot be written.
    """
    quality: dict[str, Any] = {"pictures": found[0].pictures, "seed": seed, "steps": changes(found, reference)}
    manifest = with_quality(read_manifest(bundle, kind), quality)
    try:
        write_manifest(bundle, manifest)
    except OSError as error:
        raise EngineUnavailable(f"{bundle.root} cannot be written ({error}); measure a copy that you own") from error
    return breaches(manifest)
