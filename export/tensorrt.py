"""The TensorRT engine of a bundle: an engine per role, each built from a graph that passed parity in ONNX Runtime.

An engine's file is named by a digest of all that it follows from (`key_of`), so building is skipped where that file is
there: a second start takes seconds, and after a killed build the roles that were finished are not built again. Files
come into being whole, and the manifest last.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fewstep.models.bundle import Bundle
from fewstep.models.files import sha256_of, write_whole
from fewstep.runtime.engines.built import remember
from fewstep.runtime.engines.cuda_device import CudaDevice
from fewstep.runtime.engines.manifest import (
    Graph,
    Manifest,
    checked_files,
    engine_folder,
    export_command,
    over_graphs,
    read_manifest,
    write_manifest,
)  # fmt: skip
from fewstep.runtime.engines.tensorrt_flavour import TensorRT, load_tensorrt
from fewstep.runtime.errors import EngineUnavailable

from .graphs import MAX_BATCH, axis_lengths
from .onnx_half import half_graphs
from .tensorrt_build import BATCHES, Range, Settings, build_engine, profiles_of

Progress = Callable[[str], None]
"""Called with a role, and what is done with it, when its turn begins."""


def export_tensorrt(
    bundle: Bundle,
    *,
    precision: str = "fp32",
    progress: Progress | None = None,
    flavour: str = "auto",
    roles: Sequence[str] | None = None,
    batches: Sequence[Range] = BATCHES,
    refit: bool = False,
    level: int = Settings.level,
    tensorrt: TensorRT | None = None,
) -> Manifest:
    """Build `<bundle>/engines/tensorrt[-precision]/`, or keep what is there and would come out the same.

    batches: a profile for each (least, usual, most) batch, at each of the bundle's sizes. refit, level: see `Settings`.
    tensorrt: the flavour's module; loaded by `flavour` where it is left out.

    Errors: `EngineUnavailable` where the package, a GPU that it needs, or proven ONNX graphs are missing, TensorRT
    refuses a graph or a profile, or the folder cannot be written. What was there before then still works.
    """
    tensorrt = tensorrt or load_tensorrt(flavour)
    here = _device(tensorrt) if refit or not tensorrt.flavour.portable else None
    device = None if tensorrt.flavour.portable else here
    _check_batches(batches)
    settings, tell = Settings(refit=refit, level=level), progress or (lambda part: None)
    kind = "tensorrt" if precision == "fp32" else f"tensorrt-{precision}"
    try:
        wanted = _wanted(bundle, roles)
        source = proven_onnx(bundle, wanted) if precision == "fp32" else half_graphs(bundle, precision, wanted, tell)
        files = checked_files(bundle, source)
        before = _previous(bundle, kind)
        engine_folder(bundle, kind).mkdir(parents=True, exist_ok=True)
        graphs, notes = {}, {}
        for role in wanted:
            graph = source.roles[role]
            profiles = profiles_of(graph, batches, axis_lengths(bundle))
            key = key_of(bundle, graph, tensorrt, device, precision, settings, profiles)
            make = _Build(tensorrt, role, files[role], graph, profiles, settings)
            graphs[role], notes[role] = _engine(bundle, kind, make, key, before, tell)
        manifest = Manifest(
            engine=kind,
            precision=precision,
            opset=source.opset,
            roles=graphs,
            weights_digest=bundle.weights_digest,
            producers={**source.producers, tensorrt.flavour.package: tensorrt.version},
            build={
                "flavour": tensorrt.flavour.name,
                "version": tensorrt.version,
                "device": device,
                "batches": [list(batch) for batch in batches],
                "settings": asdict(settings),
                "graphs": {row.component: row.max_relative_error for row in source.parity},
                "roles": notes,
            },
        )
        return _finish(bundle, manifest, before)
    except OSError as error:
        raise EngineUnavailable(f"{bundle.root} cannot be written ({error}); export a copy that you own") from error


def parses_and_builds(
    bundle: Bundle, roles: Sequence[str] | None = None, *, flavour: str = "auto"
) -> dict[str, str | None]:
    """Whether TensorRT parses and builds the ONNX graph of each role, at its quickest; None, or what it said.

    Errors: `EngineUnavailable` where no TensorRT or no ONNX export is here.
    """
    tensorrt, manifest = load_tensorrt(flavour), read_manifest(bundle, "onnx")
    files, found = checked_files(bundle, manifest), dict[str, str | None]()
    for role in manifest.roles if roles is None else roles:
        graph = manifest.roles[role]
        try:
            profiles = profiles_of(graph, [(1, 2, 4)], axis_lengths(bundle))
            build_engine(tensorrt, role, files[role], graph, profiles, Settings(level=0))
            found[role] = None
        except EngineUnavailable as error:
            found[role] = str(error)
    return found


def proven_onnx(bundle: Bundle, roles: Sequence[str]) -> Manifest:
    """The manifest of the engine "onnx", if its graphs have been proven equal to torch.

    Errors: `EngineUnavailable` saying what is not so, with the command that makes it so.
    """
    manifest = read_manifest(bundle, "onnx")
    missing = sorted(set(roles) - set(manifest.roles))
    if not manifest.verified or missing:
        problem = f"lacks {missing[0]!r}" if missing else "has not passed parity with torch"
        raise EngineUnavailable(
            f"the ONNX export of {bundle.name} {problem}, and TensorRT is built from proven graphs alone; "
            f"run `{export_command(bundle, 'onnx')}`"
        )
    return manifest


def key_of(
    bundle: Bundle,
    graph: Graph,
    tensorrt: TensorRT,
    device: Mapping[str, str] | None,
    precision: str,
    settings: Settings,
    profiles: Sequence[Any],
) -> dict[str, Any]:
    """All that an engine follows from, by name, as JSON gives it back. device: None for an engine bound to none."""
    parts = {
        "graph": graph.sha256,
        "weights": [bundle.weights_digest, graph.data_sha256],
        "flavour": tensorrt.flavour.name,
        "version": tensorrt.version,
        "device": device,
        "precision": precision,
        "settings": asdict(settings),
        "profiles": profiles,
    }
    found: dict[str, Any] = json.loads(json.dumps(parts))
    return found


@dataclass(frozen=True)
class _Build:
    """A build that may not be needed."""

    tensorrt: TensorRT
    role: str
    file: Path
    graph: Graph
    profiles: Sequence[Any]
    settings: Settings


def _engine(
    bundle: Bundle, kind: str, build: _Build, key: dict[str, Any], before: Manifest | None, tell: Progress
) -> tuple[Graph, dict[str, Any]]:
    """A role's engine, kept or built, and what the manifest notes of it."""
    role, graph = build.role, build.graph
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = engine_folder(bundle, kind) / f"{role.replace('+', '_')}.{digest}.plan"
    old = before.roles.get(role) if before is not None else None
    note = _note(before, role)
    if path.is_file() and (old is None or old.file != path.name or old.sha256 == sha256_of(path)):
        tell(f"{role}: kept")
        kept = replace(graph, file=path.name, sha256=sha256_of(path), data_sha256=None)
        return kept, note if old is not None and old.file == path.name else {"key": key, "build_s": None}
    changed = [name for name in key if note.get("key", {}).get(name) != key[name]] or ["its file"]
    tell(f"{role}: built, {', '.join(changed)} changed" if old is not None else f"{role}: built")
    begun = time.monotonic()
    timings = path.with_name("timings.cache")
    engine = build_engine(build.tensorrt, role, build.file, graph, build.profiles, build.settings, timings=timings)
    write_whole(path, engine)
    note = {"key": key, "build_s": round(time.monotonic() - begun, 1)}
    return replace(graph, file=path.name, sha256=sha256_of(path), data_sha256=None), note


def _note(manifest: Manifest | None, role: str) -> dict[str, Any]:
    """What an earlier manifest notes of a role."""
    build = manifest.build if manifest is not None else None
    found: dict[str, Any] = (build or {}).get("roles", {}).get(role, {})
    return found


def _finish(bundle: Bundle, manifest: Manifest, before: Manifest | None) -> Manifest:
    """Keep the earlier manifest where nothing changed, with what was proven under it; else write this one."""
    if before is not None and over_graphs(before, before.engine, build=before.build) == manifest:
        return before
    write_manifest(bundle, manifest)
    remember(manifest)
    used = {graph.file for graph in manifest.roles.values()}
    for path in engine_folder(bundle, manifest.engine).glob("*.plan*"):
        if path.name not in used:
            path.unlink()
    return manifest


def _check_batches(batches: Sequence[Range]) -> None:
    """What TensorRT does not see: a batch of none, and one that the graphs were not exported for."""
    for batch in batches:
        if min(batch) < 1 or max(batch) > MAX_BATCH:
            raise EngineUnavailable(f"batches has {batch}; graphs are exported for batches of 1 to {MAX_BATCH}")


def _wanted(bundle: Bundle, roles: Sequence[str] | None) -> tuple[str, ...]:
    if unknown := sorted(set(roles or ()) - set(bundle.roles)):
        raise EngineUnavailable(f"role is {unknown[0]!r}; {bundle.root} has the roles {', '.join(bundle.roles)}")
    return bundle.roles if roles is None else tuple(roles)


def _previous(bundle: Bundle, kind: str) -> Manifest | None:
    try:
        return read_manifest(bundle, kind)
    except EngineUnavailable:
        return None


def _device(tensorrt: TensorRT) -> dict[str, str]:
    try:
        return CudaDevice().identity()
    except EngineUnavailable as error:
        raise EngineUnavailable(
            f"{tensorrt} builds such an engine on the GPU that it is for, and {error}; "
            "the flavour tensorrt-rtx builds without one, if without refit"
        ) from error
