"""Is an exported engine the same model? Every role beside torch on random inputs, and whole golden cases step by step.

Two errors are published and bounded, each of the worst sample of a batch: relative L2, |a - b| / |b|, and the peak, the
largest single difference relative to the largest value, which sees a fault in one corner that the norm averages away.
Rounding spreads over a picture and its largest of thousands lies above the mean: below fp32 the peak has a bound of
its own. An engine with a stated budget (`runtime.engines.budget`) is held to that.

In fp32 the last latent of a golden case is held to its tolerance. Below fp32 the first one is: sampling itself makes a
small difference a hundred times larger within a few steps (an object a pixel further left), which is published as the
drift of every step and says nothing of the engine; a budget of pictures does.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.models.bundle import Bundle
from fewstep.models.roles import picture_steps
from fewstep.models.spec import GoldenCase
from fewstep.runtime.engine import CONTROLNET, Engine
from fewstep.runtime.engines.budget import Budget, breaches, quality_parity
from fewstep.runtime.engines.choice import measure_costs, record_costs
from fewstep.runtime.engines.cuda_device import device_here
from fewstep.runtime.engines.manifest import Manifest, Parity, exported_kinds, read_manifest, write_manifest
from fewstep.runtime.engines.registry import KINDS, open_engine
from fewstep.runtime.engines.torch_engine import TorchEngine
from fewstep.runtime.errors import EngineFailed, EngineUnavailable
from fewstep.runtime.sampling.step import run_batch

from .golden import load_case, run_case
from .graphs import Run, random_feeds
from .parity import LOST, SAME, Apart, apart

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2, "int8": 5e-2, "fp8": 5e-2}
"""Relative L2 error of a role's outputs, where the engine states no budget."""
PEAK = 2.5
"""How far the peak may lie above the tolerance, below fp32."""
STEPS = 2.5
"""How far the first latent of a golden case may, below fp32: text and denoiser were rounded. In fp32 each case states a
tolerance for its last latent."""
BATCHES = (1, 3)
LARGE_PICTURE = 256 * 256
"""Pixels above which two rows must do: three of a 512-pixel decoder need 20 GB beside both forms of its weights."""
SEED = 7


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison. component: a role, "golden:<case>", "quality", or "open" where the engine could not be opened.

    drift: relative error of the latent after each step. Errors are None where there is no number: see `note`.
    """

    engine: str
    component: str
    max_relative_error: float | None
    tolerance: float
    ok: bool
    max_peak_error: float | None = None
    peak_tolerance: float | None = None
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
    bundle: Bundle,
    *,
    kinds: tuple[str, ...] | None = None,
    budget: Budget | None = None,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Compare every exported engine (or those of `kinds`) with torch, and torch with the golden cases.

    An engine's manifest gets its results, and is marked verified if and only if all passed. What a budget states takes
    the place of what the manifests do.

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
    notes = [] if bundle.spec.golden else [f"no golden cases; `fewstep export {bundle.root}` makes them"]
    here, measured = device_here(), False
    for kind in exported:
        if budget is not None and budget.stated:
            _restate(bundle, kind, budget)
        if KINDS[kind].must_have_run and here is None:
            notes.append(f"{kind} was built and never run: no GPU here; `fewstep verify {bundle.root}` where it serves")
            continue
        found, costs = _engine_rows(kind, reference, bundle, tell)
        _record(bundle, kind, found, costs, here if KINDS[kind].must_have_run else None)
        rows += found
        measured = measured or bool(costs)
    if measured:
        record_costs(bundle, "torch", measure_costs(reference, bundle))
    if not exported and kinds is None:
        notes.append(f"no exported engine; run `fewstep export {bundle.root} --engine onnx`")
    return Report(ok=all(r.ok for r in rows), bundle=bundle.name, engines=tuple(rows), notes=tuple(notes))


def random_rows(bundle: Bundle, role: str) -> tuple[dict[str, Tensor], ...]:
    """Feeds of a batch of one that every engine is held to, for exporters that choose by them."""
    most = max(batches_for(bundle.spec.sizes[0]))
    feeds = random_feeds(bundle, role, batch=most, size=bundle.spec.sizes[0], seed=SEED)
    return tuple({name: value[k : k + 1].contiguous() for name, value in feeds.items()} for k in range(most))


def batches_for(size: tuple[int, int]) -> tuple[int, ...]:
    """The batches that roles are compared at: one row, and several of mixed times."""
    return BATCHES if size[0] * size[1] <= LARGE_PICTURE else (1, 2)


def tolerance_of(manifest: Manifest) -> float:
    """The relative L2 error that a role of this engine may have: the budget's where it states one."""
    return manifest.budget.get("error") or TOLERANCE[manifest.precision]


def rounded_bounds(precision: str, tolerance: float, role: str) -> Apart:
    """What a role may be apart. Below float32 each network of the role adds its own rounding: `picture` has three,
    `picture-N` two and its N steps."""
    networks = 2 + (picture_steps(role) or -1) if precision != "fp32" else 1
    return _bounds(precision, tolerance * networks)


def _engine_rows(
    kind: str, reference: Engine, bundle: Bundle, tell: Callable[[str], None]
) -> tuple[list[Row], dict[str, Any]]:
    """Every comparison with one engine, and what its calls cost here; no costs where one failed."""
    try:
        manifest = read_manifest(bundle, kind)
        options = {"allow_unproven": True} if KINDS[kind].must_have_run else {}
        engine = open_engine(bundle, kind, **options)
    except EngineUnavailable as error:
        row = Row(engine=kind, component="open", max_relative_error=None, tolerance=0.0, ok=False, note=str(error))
        return [row], {}
    allowed = tolerance_of(manifest)
    try:
        rows = []
        for role in manifest.roles or [role for role in bundle.roles if role in engine.capabilities.roles]:
            tell(f"{kind} {role}")
            rows.append(
                _role_row(kind, role, engine, reference, bundle, rounded_bounds(manifest.precision, allowed, role))
            )
        golden = None if manifest.precision == "fp32" else _bounds(manifest.precision, allowed * STEPS)
        rows += [*_golden_rows(kind, engine, bundle, golden, tell), *_quality_rows(manifest)]
        return rows, measure_costs(engine, bundle) if all(row.ok for row in rows) else {}
    finally:
        engine.close()


def _bounds(precision: str, tolerance: float) -> Apart:
    return Apart(tolerance, tolerance * (1.0 if precision == "fp32" else PEAK))


def _role_row(kind: str, role: str, engine: Engine, reference: Engine, bundle: Bundle, bounds: Apart) -> Row:
    """One role at each batch size, and once at each further picture size, on inputs of mixed times."""
    sizes = bundle.spec.sizes
    cases = [(batch, sizes[0]) for batch in batches_for(sizes[0])] + [(1, size) for size in sizes[1:]]
    worst = SAME
    for batch, size in cases:
        feeds = random_feeds(bundle, role, batch=batch, size=size, seed=SEED, run=_copied(reference))
        wanted = [out.clone() for out in reference.run(role, feeds)]
        try:
            worst |= apart(run_batch(engine, role, feeds), wanted)
        except EngineFailed as failure:
            return _row(kind, role, LOST, bounds, note=str(failure))
    return _row(kind, role, worst, bounds)


def _golden_rows(
    kind: str, engine: Engine, bundle: Bundle, bounds: Apart | None, tell: Callable[[str], None]
) -> list[Row]:
    """Each golden case on one engine. bounds: of the latent after the first step; None: the case's, after the last."""
    rows = []
    for case in bundle.spec.golden:
        if case.control is not None and CONTROLNET not in engine.capabilities.roles:
            continue
        tell(f"{kind} {case.file}")
        rows.append(_golden_row(kind, engine, bundle, case, bounds))
    return rows


def _golden_row(kind: str, engine: Engine, bundle: Bundle, case: GoldenCase, first: Apart | None) -> Row:
    component = f"golden:{case.file.removesuffix('.safetensors')}"
    bounds = first or Apart(case.tolerance, case.tolerance)
    wanted = load_case(bundle, case)
    try:
        trace = run_case(engine, bundle, case, wanted["edge"].numpy() if case.control else None)
    except EngineFailed as failure:
        return _row(kind, component, LOST, bounds, note=str(failure))
    steps = [apart([a[None]], [b[None]]) for a, b in zip(trace.latents, wanted["latents"], strict=False)]
    held = steps[0 if first else -1] if len(trace.latents) == len(wanted["latents"]) else LOST
    row = _row(kind, component, held if all(map(_is_finite, steps)) else LOST, bounds)
    off = (torch.from_numpy(trace.picture).int() - wanted["picture"].int()).abs().max()
    drift = tuple(_finite(step.relative) for step in steps)
    return replace(row, drift=drift, picture_max_difference=int(off))


def _quality_rows(manifest: Manifest) -> list[Row]:
    """One row where the budget names a measure of pictures."""
    remedy = f"`fewstep bench quality DIR --engine {manifest.engine} --write` measures them"
    said = [*breaches(manifest), *([] if manifest.quality else [remedy])]
    return [
        Row(
            engine=manifest.engine,
            component=entry.component,
            max_relative_error=None,
            tolerance=entry.tolerance,
            ok=entry.ok,
            note="; ".join(said) or None,
        )
        for entry in quality_parity(manifest)
    ]


def _row(kind: str, component: str, found: Apart, bounds: Apart, note: str | None = None) -> Row:
    if _finite(found.relative) is None and note is None:
        note = "outputs are not finite, or of another shape or number"
    return Row(
        engine=kind,
        component=component,
        max_relative_error=_finite(found.relative),
        tolerance=bounds.relative,
        ok=found.relative <= bounds.relative and found.peak <= bounds.peak,
        max_peak_error=_finite(found.peak),
        peak_tolerance=bounds.peak,
        note=note,
    )


def _is_finite(step: Apart) -> bool:
    return _finite(step.relative) is not None


def _finite(error: float) -> float | None:
    """JSON has no infinity."""
    return error if error < float("inf") else None


def _copied(reference: Engine) -> Run:
    """An engine's `run` whose outputs stay."""

    def run(role: str, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(out.clone() for out in reference.run(role, feeds))

    return run


def _restate(bundle: Bundle, kind: str, budget: Budget) -> None:
    """Keep a newly stated budget in the engine's manifest, if there is a readable one."""
    try:
        manifest = read_manifest(bundle, kind)
    except EngineUnavailable:
        return
    _write(bundle, replace(manifest, budget={**manifest.budget, **budget.stated}))


def _record(
    bundle: Bundle, kind: str, rows: list[Row], costs: dict[str, Any], device: Mapping[str, str] | None = None
) -> None:
    """Write the outcome into the engine's manifest, if there is a readable one. device: where it ran, to be noted."""
    try:
        manifest = read_manifest(bundle, kind)
    except EngineUnavailable:
        return
    kept = {f.name for f in fields(Parity)}
    parity = tuple(Parity(**{name: value for name, value in vars(row).items() if name in kept}) for row in rows)
    ok = all(row.ok for row in rows)
    ran = device if ok and device is not None else manifest.executed_on
    done = replace(manifest, parity=parity, verified=ok, costs=costs or manifest.costs, executed_on=ran)
    if done != manifest:
        _write(bundle, done)


def _write(bundle: Bundle, manifest: Manifest) -> None:
    try:
        write_manifest(bundle, manifest)
    except OSError as error:
        raise EngineUnavailable(f"{bundle.root} cannot be written ({error}); verify a copy that you own") from error
