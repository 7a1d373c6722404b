"""How much worse than torch an engine may be: a stated budget, and whether what was measured stays within it. No torch.

A budget is kept in the engine's manifest, so every later check holds the engine to it.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import EngineUnavailable
from .manifest import Manifest, Parity

QUALITY = "quality"
"""The component of a manifest's parity that stands for pictures."""
_WORSE = {"compliance": -1.0, "frechet": 1.0}
"""Measure -> the direction in which it gets worse."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What may be lost; None was not stated.

    error: relative L2 error of a component's outputs. compliance: how far the mean fraction of claims met may fall.
    frechet: how far the Frechet distance may rise. The last two hold at every measured step count.

    Errors: `EngineUnavailable` naming the field that is not a number above 0.
    """

    error: float | None = None
    compliance: float | None = None
    frechet: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not (math.isfinite(value) and value > 0):
                raise EngineUnavailable(f"budget {name} is {value}; it must be a number above 0")

    @property
    def stated(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def with_quality(manifest: Manifest, quality: Mapping[str, Any]) -> Manifest:
    """The manifest with measured quality, verified if and only if all its comparisons passed and it is within budget.

    quality: {"pictures", "seed", "steps": {"4": {"compliance", "frechet", "compliance_change", "frechet_change"}}},
    changes being the engine's figure less torch's on the same prompts and seeds.
    """
    known = replace(manifest, quality=dict(quality))
    parity = tuple(p for p in manifest.parity if p.component != QUALITY) + quality_parity(known)
    compared = any(p.component != QUALITY for p in parity)
    return replace(known, parity=parity, verified=compared and all(p.ok for p in parity))


def quality_parity(manifest: Manifest) -> tuple[Parity, ...]:
    """One entry where the budget names a measure of pictures, else none."""
    if not any(name in manifest.budget for name in _WORSE):
        return ()
    return (Parity(component=QUALITY, max_relative_error=None, tolerance=0.0, ok=not breaches(manifest)),)


def breaches(manifest: Manifest) -> list[str]:
    """What passes the budget of pictures, with the numbers of both sides; also that nothing was measured."""
    asked = {name: bound for name, bound in manifest.budget.items() if name in _WORSE and bound is not None}
    steps = manifest.quality.get("steps", {})
    if asked and not steps:
        return [f"a budget for {' and '.join(asked)} is stated and the engine's pictures were not measured"]
    found = []
    for count, figures in steps.items():
        for name, bound in asked.items():
            change = figures[f"{name}_change"]
            if change * _WORSE[name] > bound:
                before = figures[name] - change
                found.append(
                    f"{name} at {count} steps is {figures[name]:.4g}, torch's {before:.4g}: "
                    f"worse by {abs(change):.3g}, allowed {bound:g}"
                )
    return found
