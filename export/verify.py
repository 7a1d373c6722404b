"""Is an exported engine the same model? Every role beside torch on random inputs, and whole golden cases step by step.

The error of an output is the larger of two, over the worst sample of a batch: relative L2 |a - b| / |b|, and the
largest single difference relative to the largest value, which sees a fault in one corner that the norm averages away.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.models.bundle import Bundle
from fewstep.models.spec import GoldenCase
from fewstep.runtime.engine import CONTROLNET, Engine
from fewstep.runtime.engines import open_engine
from fewstep.runtime.errors import EngineFailed, EngineUnavailable
from fewstep.runtime.manifest import Manifest, Parity, exported_kinds, read_manifest, write_manifest
from fewstep.runtime.step import run_batch
from fewstep.runtime.torch_engine import TorchEngine

from .golden import load_case, run_case
from .graphs import Run, random_feeds

COMPONENT_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
GOLDEN_TOLERANCE = {"bf16": 5e-2}
"""Of the last latent of a golden case, where rounding has been through every step; in fp32 each case states its own."""
BATCHES = (1, 3)
SEED = 7


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison. component: a role, "golden:<case>", or "open" where the engine could not be opened.

    drift: error of the latent after each step. max_relative_error is None where there is no number: see `note`.
    """

    engine: str
    component: str
    max_relative_error: float | None
    tolerance: float
    ok: bool
    drift: tuple[float | None, ...] = ()
    picture_max_difference: int | None = None
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    ok: bool
    bundle: str
    engines: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def verify(
    bundle: Bundle, *, kinds: tuple[str, ...] | None = None, progress: Callable[[str], None] | None = None
) -> Report:
    """Compare every exported engine (or those of `kinds`) with torch, and torch with the golden cases.

    An engine's manifest gets its results, and is marked verified if and only if all passed.

    Errors: `EngineUnavailable` where there is nothing to compare.
    """
    exported = exported_kinds(bundle) if kinds is None else tuple(k for k in kinds if k != "torch")
    if not exported and not bundle.spec.golden:
        raise EngineUnavailable(
            f"{bundle.root} has neither engines nor golden cases; run `fewstep export {bundle.root}`"
        )
    tell = progress or (lambda part: None)
    reference = TorchEngine(bundle)
    rows = list(_golden_rows("torch", reference, bundle, None, tell))
    for kind in exported:
        found = _engine_rows(kind, reference, bundle, tell)
        _record(bundle, kind, found)
        rows += found
    notes = [] if bundle.spec.golden else [f"no golden cases; `fewstep export {bundle.root}` makes them"]
    if not exported and kinds is None:
        notes.append(f"no exported engine; run `fewstep export {bundle.root} --engine onnx`")
    return Report(ok=all(r.ok for r in rows), bundle=bundle.name, engines=tuple(rows), notes=tuple(notes))


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """The worst sample's error of [B, ...], see the module text; infinite for other shapes or non-finite values."""
    if found.shape != wanted.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    a, b = found.flatten(1).double(), wanted.flatten(1).double()
    tiny = torch.finfo(torch.float32).tiny
    norms = (a - b).norm(dim=1) / b.norm(dim=1).clamp_min(tiny)
    peaks = (a - b).abs().amax(dim=1) / b.abs().amax(dim=1).clamp_min(tiny)
    return float(torch.maximum(norms, peaks).max())


def _engine_rows(kind: str, reference: Engine, bundle: Bundle, tell: Callable[[str], None]) -> list[Row]:
    try:
        manifest = read_manifest(bundle, kind)
        engine = open_engine(bundle, kind)
    except EngineUnavailable as error:
        return [Row(engine=kind, component="open", max_relative_error=None, tolerance=0.0, ok=False, note=str(error))]
    try:
        rows = []
        for role in manifest.roles:
            tell(f"{kind} {role}")
            rows.append(_role_row(kind, role, engine, reference, bundle, COMPONENT_TOLERANCE[manifest.precision]))
        return rows + _golden_rows(kind, engine, bundle, GOLDEN_TOLERANCE.get(manifest.precision), tell)
    finally:
        engine.close()


def _role_row(kind: str, role: str, engine: Engine, reference: Engine, bundle: Bundle, tolerance: float) -> Row:
    """One role at each batch size, and once at each further picture size, on inputs of mixed times."""
    sizes = bundle.spec.sizes
    cases = [(batch, sizes[0]) for batch in BATCHES] + [(1, size) for size in sizes[1:]]
    error, note = 0.0, None
    for batch, size in cases:
        feeds = random_feeds(bundle, role, batch=batch, size=size, seed=SEED, run=_copied(reference))
        wanted = [out.clone() for out in reference.run(role, feeds)]
        try:
            found = run_batch(engine, role, feeds)
        except EngineFailed as failure:
            error, note = float("inf"), str(failure)
            break
        pairs = zip(found, wanted, strict=False)
        error = max(
            error, *(relative_error(a, b) for a, b in pairs), 0.0 if len(found) == len(wanted) else float("inf")
        )
    return _row(kind, role, error, tolerance, note=note)


def _golden_rows(
    kind: str, engine: Engine, bundle: Bundle, tolerance: float | None, tell: Callable[[str], None]
) -> list[Row]:
    """Each golden case on one engine. The tolerance (None: the case's own) is for the latent after the last step."""
    rows = []
    for case in bundle.spec.golden:
        if case.control is not None and CONTROLNET not in engine.capabilities.roles:
            continue
        tell(f"{kind} {case.file}")
        rows.append(_golden_row(kind, engine, bundle, case, case.tolerance if tolerance is None else tolerance))
    return rows


def _golden_row(kind: str, engine: Engine, bundle: Bundle, case: GoldenCase, tolerance: float) -> Row:
    component = f"golden:{case.file.removesuffix('.safetensors')}"
    wanted = load_case(bundle, case)
    try:
        trace = run_case(engine, bundle, case, wanted["edge"].numpy() if case.control else None)
    except EngineFailed as failure:
        return _row(kind, component, float("inf"), tolerance, note=str(failure))
    drift = [relative_error(a[None], b[None]) for a, b in zip(trace.latents, wanted["latents"], strict=False)]
    error = drift[-1] if len(trace.latents) == len(wanted["latents"]) else float("inf")
    off = (torch.from_numpy(trace.picture).int() - wanted["picture"].int()).abs().max()
    row = _row(kind, component, error, tolerance)
    return replace(row, drift=tuple(map(_finite, drift)), picture_max_difference=int(off))


def _row(kind: str, component: str, error: float, tolerance: float, note: str | None = None) -> Row:
    value = _finite(error)
    if value is None and note is None:
        note = "outputs are not finite, or of another shape or number"
    ok = value is not None and value <= tolerance
    return Row(engine=kind, component=component, max_relative_error=value, tolerance=tolerance, ok=ok, note=note)


def _finite(error: float) -> float | None:
    """JSON has no infinity."""
    return error if error < float("inf") else None


def _copied(reference: Engine) -> Run:
    """An engine's `run` whose outputs stay."""

    def run(role: str, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(out.clone() for out in reference.run(role, feeds))

    return run


def _record(bundle: Bundle, kind: str, rows: list[Row]) -> None:
    """Write the outcome into the engine's manifest, if there is a readable one."""
    try:
        manifest: Manifest = read_manifest(bundle, kind)
    except EngineUnavailable:
        return
    parity = tuple(
        Parity(component=r.component, max_relative_error=r.max_relative_error, tolerance=r.tolerance, ok=r.ok)
        for r in rows
    )
    done = replace(manifest, parity=parity, verified=all(r.ok for r in rows))
    if done == manifest:
        return
    try:
        write_manifest(bundle, done)
    except OSError as error:
        raise EngineUnavailable(f"{bundle.root} cannot be written ({error}); verify a copy that you own") from error
