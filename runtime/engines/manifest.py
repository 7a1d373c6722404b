"""What an exported engine says of itself: `<bundle>/engines/<kind>/manifest.json`, and the checks before it may run.

An engine is bound to the weights it was made from (`weights_digest`) and to its own files (SHA-256 each). `verified` is
set by `fewstep verify` alone, after every comparison with torch passed. No torch here.
"""

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fewstep.models.bundle import Bundle
from fewstep.models.files import sha256_of, write_whole
from fewstep.models.roles import DENOISER

from ..errors import EngineUnavailable

MANIFEST_VERSION = 1
KINDS = (
    "torch-bf16", "torch-compile", "torch-compile-bf16", "torch-cudagraphs", "torch-cudagraphs-bf16",
    "torch-compile-cudagraphs", "torch-compile-cudagraphs-bf16", "aoti", "aoti-bf16", "onnx-cuda", "onnx-tensorrt",
    "onnx", "onnx-int8", "openvino", "openvino-bf16", "openvino-int8",
    "tensorrt", "tensorrt-fp16", "tensorrt-bf16",
)  # fmt: skip
"""Kinds of exported engine this release reads."""
PRECISIONS = ("bf16", "fp16", "fp8", "int8")
"""Endings of engine kinds; a kind without one is of float32."""


@dataclass(frozen=True, kw_only=True)
class Port:
    """An input or output; an entry of `shape` is a fixed length or the name of a free axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One role's file, relative to the engine's folder. Weights of large graphs lie in `<file>.data`."""

    file: str
    sha256: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    data_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Parity:
    """A comparison with torch that was made on these files (`fewstep.export.verify`, which says what the errors are).

    drift: of a golden case, the relative error of the latent after each step.
    """

    component: str
    max_relative_error: float | None
    tolerance: float
    ok: bool
    max_peak_error: float | None = None
    peak_tolerance: float | None = None
    drift: tuple[float | None, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that is said of one kind of engine.

    build: how an engine that was compiled ahead was built (package, version, device, settings, profiles); None where
    nothing was. executed_on: the device on which it has run and agreed with torch; None until it has. costs: what calls
    cost on the machine that measured them; empty until then. treatments: the precision of each role where roles differ.
    budget: how much worse than torch it may be (`runtime.engines.budget`). quality: its pictures beside torch's per
    step count, empty until `fewstep bench quality` measured them.
    """

    engine: str
    precision: str
    opset: int
    roles: Mapping[str, Graph]
    weights_digest: str
    producers: Mapping[str, str]
    parity: tuple[Parity, ...] = ()
    verified: bool = False
    build: Mapping[str, Any] | None = None
    executed_on: Mapping[str, Any] | None = None
    costs: Mapping[str, Any] = field(default_factory=dict)
    treatments: Mapping[str, str] = field(default_factory=dict)
    budget: Mapping[str, float | None] = field(default_factory=dict)
    quality: Mapping[str, Any] = field(default_factory=dict)
    version: int = MANIFEST_VERSION

    def takes(self, name: str) -> bool:
        """Whether the denoiser's graph has an input of this name."""
        return DENOISER in self.roles and any(port.name == name for port in self.roles[DENOISER].inputs)


def engine_folder(bundle: Bundle, kind: str) -> Path:
    return bundle.root / "engines" / kind


def exported_kinds(bundle: Bundle) -> tuple[str, ...]:
    """The kinds of engine whose manifest lies in the bundle, usable or not."""
    return tuple(kind for kind in KINDS if (engine_folder(bundle, kind) / "manifest.json").is_file())


def export_command(bundle: Bundle, kind: str) -> str:
    """The command that makes a kind of engine."""
    engine, _, precision = kind.rpartition("-")
    chosen = f"{engine} --precision {precision}" if engine and precision in PRECISIONS else kind
    return f"fewstep export {bundle.root} --engine {chosen}"


def over_graphs(source: Manifest, engine: str, **changes: Any) -> Manifest:
    """A manifest of the kind `engine` over the graphs of `source`: nothing that was measured, proven or stated of that
    engine is said of this one."""
    made = {f.name: getattr(source, f.name) for f in fields(Manifest) if f.default is f.default_factory is MISSING}
    return Manifest(**{**made, "engine": engine, **changes})


def write_manifest(bundle: Bundle, manifest: Manifest) -> Path:
    path = engine_folder(bundle, manifest.engine) / "manifest.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(asdict(manifest), indent=1) + "\n").encode())
    return path


def read_manifest(bundle: Bundle, kind: str) -> Manifest:
    """The manifest of one kind of engine.

    Errors: `EngineUnavailable` where it is missing, of another version or malformed; the message has the remedy.
    """
    path = engine_folder(bundle, kind) / "manifest.json"
    remedy = f"run `{export_command(bundle, kind)}`"
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise EngineUnavailable(f"{bundle.name} has no {kind} engine; {remedy}") from None
    except ValueError as error:
        raise EngineUnavailable(f"{path} is not JSON ({error}); {remedy}") from error
    if not isinstance(data, dict) or data.get("version") != MANIFEST_VERSION:
        raise EngineUnavailable(f"{path} is not of version {MANIFEST_VERSION}, which this release reads; {remedy}")
    try:
        manifest = _manifest(data)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise EngineUnavailable(f"{path} is malformed ({error}); {remedy}") from error
    if manifest.engine != kind:
        raise EngineUnavailable(f"{path} describes the engine {manifest.engine!r}, not {kind!r}; {remedy}")
    return manifest


def checked_files(bundle: Bundle, manifest: Manifest) -> dict[str, Path]:
    """The file of each role, after checking that weights and files are the ones the manifest was written for.

    Errors: `EngineUnavailable` naming what differs and the remedy.
    """
    remedy = f"run `{export_command(bundle, manifest.engine)}`"
    if manifest.weights_digest != bundle.weights_digest:
        raise EngineUnavailable(f"the {manifest.engine} engine of {bundle.name} was made from other weights; {remedy}")
    engines = (bundle.root / "engines").resolve()
    files = {}
    for role, graph in manifest.roles.items():
        path = (engine_folder(bundle, manifest.engine) / graph.file).resolve()
        if not path.is_relative_to(engines):
            raise EngineUnavailable(f"the manifest's {role} file {graph.file!r} lies outside {engines}; {remedy}")
        for part, digest in ((path, graph.sha256), (path.with_name(path.name + ".data"), graph.data_sha256)):
            if digest is not None and not part.is_file():
                raise EngineUnavailable(f"{part} is missing; {remedy}")
            if digest is not None and sha256_of(part) != digest:
                raise EngineUnavailable(f"{part} changed since it was exported (wrong SHA-256); {remedy}")
        files[role] = path
    return files


def _manifest(data: Mapping[str, Any]) -> Manifest:
    unknown = set(data) - {f.name for f in fields(Manifest)}
    if unknown:
        raise ValueError(f"unknown field {sorted(unknown)[0]!r}")
    roles = {
        role: Graph(
            file=str(entry["file"]),
            sha256=str(entry["sha256"]),
            data_sha256=entry.get("data_sha256"),
            inputs=tuple(map(_port, entry["inputs"])),
            outputs=tuple(map(_port, entry["outputs"])),
        )
        for role, entry in data["roles"].items()
    }
    parity = tuple(Parity(**{**row, "drift": tuple(row.get("drift", ()))}) for row in data.get("parity", ()))
    objects = dict.fromkeys(("costs", "treatments", "budget", "quality"), dict)
    for name, allowed in {**objects, "build": dict | None, "executed_on": dict | None}.items():
        if not isinstance(data.get(name, {}), allowed):
            raise ValueError(f"{name} is {data[name]!r}; it must be an object")
    return Manifest(**{**data, "roles": roles, "parity": parity})


def _port(entry: Mapping[str, Any]) -> Port:
    return Port(name=str(entry["name"]), dtype=str(entry["dtype"]), shape=tuple(entry["shape"]))
