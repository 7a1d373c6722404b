"""Bundle to ONNX: one graph per role, raw network outputs, every scalar an input of shape [B].

Opset 21: later ones emit an `Attention` operator that engines reject. The files hold no paths or source lines of the
machine that made them, and the same weights give the same bytes with the same exporter.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fewstep.models.bundle import Bundle
from fewstep.models.files import sha256_of
from fewstep.runtime.engines.manifest import (
    Graph,
    Manifest,
    Port,
    checked_files,
    engine_folder,
    read_manifest,
    write_manifest,
)  # fmt: skip
from fewstep.runtime.errors import EngineUnavailable

from .graph_patches import mend
from .graphs import RoleGraph, role_graph

OPSET = 21
EXTERNAL_OVER_BYTES = 1_500_000_000
"""Weights above this go to a file beside the graph: a protobuf message ends at 2 GB."""
Progress = Callable[[str], None]
"""Called with a role when its export begins."""


def export_onnx(
    bundle: Bundle,
    *,
    precision: str = "fp32",
    roles: Sequence[str] | None = None,
    graphs: Sequence[str] = (),
    progress: Progress | None = None,
) -> Manifest:
    """Write `<bundle>/engines/onnx/`: a graph per role and an unverified manifest (see `fewstep.export.verify`).

    graphs: of the bundle's `extra_roles`, those to export too.

    Errors: `EngineUnavailable` where a package is missing, the precision is not fp32, a role is unknown or the folder
    cannot be written.
    """
    if precision != "fp32":
        raise EngineUnavailable(f"precision is {precision!r}; the engine 'onnx' has fp32")
    _require_packages()
    folder = engine_folder(bundle, "onnx")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").unlink(missing_ok=True)  # graphs in the making have no manifest
        made = {}
        for role in (*(bundle.roles if roles is None else roles), *graphs):
            if progress is not None:
                progress(role)
            made[role] = export_role(role_graph(bundle, role), folder)
        manifest = Manifest(
            engine="onnx",
            precision="fp32",
            opset=OPSET,
            roles=made,
            weights_digest=bundle.weights_digest,
            producers={name: version(name) for name in ("torch", "diffusers", "transformers", "onnx", "onnxscript")},
        )
        write_manifest(bundle, manifest)
    except OSError as error:
        raise EngineUnavailable(
            f"{folder} cannot be written ({error}); export a copy of the bundle that you own"
        ) from error
    return manifest


def usable_onnx(bundle: Bundle) -> Manifest | None:
    """The manifest of the ONNX export, if its files are intact and of these weights."""
    try:
        manifest = read_manifest(bundle, "onnx")
        checked_files(bundle, manifest)
    except EngineUnavailable:
        return None
    return manifest


def export_role(graph: RoleGraph, folder: Path, *, external_over_bytes: int = EXTERNAL_OVER_BYTES) -> Graph:
    """Write one role's graph and give its manifest entry."""
    import onnx

    program = _program(graph)
    path = folder / f"{graph.role.replace('+', '_')}.onnx"
    data = path.with_suffix(".onnx.data")
    data.unlink(missing_ok=True)
    weights_bytes = sum(p.numel() * p.element_size() for p in graph.module.parameters())
    program.save(path, external_data=weights_bytes > external_over_bytes)
    proto = onnx.load(path, load_external_data=False)
    mend(proto)
    _strip(proto)
    path.write_bytes(proto.SerializeToString(deterministic=True))
    return Graph(
        file=path.name,
        sha256=sha256_of(path),
        data_sha256=sha256_of(data) if data.is_file() else None,
        inputs=tuple(map(_port, proto.graph.input)),
        outputs=tuple(map(_port, proto.graph.output)),
    )


def _program(graph: RoleGraph) -> Any:
    try:
        with _quiet():
            return torch.onnx.export(
                graph.module,
                tuple(graph.feeds.values()),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(graph.feeds),
                output_names=list(graph.outputs),
                dynamic_shapes=(tuple(graph.axes[name] for name in graph.feeds),),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        said = str(error).strip().splitlines()[0]
        raise EngineUnavailable(
            f"torch {torch.__version__} cannot export {graph.role!r} ({said}); use --engine torch"
        ) from error


def _strip(proto: Any) -> None:
    """Remove what describes the making, not the mathematics: stack traces with local paths, and stale shapes."""
    proto.ClearField("metadata_props")
    proto.ClearField("doc_string")
    del proto.graph.value_info[:]
    graph = proto.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer, *proto.functions):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


def _port(value: Any) -> Port:
    import onnx

    kind = value.type.tensor_type
    shape = tuple(d.dim_param or int(d.dim_value) for d in kind.shape.dim)
    return Port(name=value.name, dtype=str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)), shape=shape)


def _require_packages() -> None:
    for name in ("onnx", "onnxscript"):
        try:
            __import__(name)
        except ImportError as error:
            raise EngineUnavailable(f"{name} is not installed; pip install 'fewstep[export]'") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporter's remarks on packages it can do without and on names that batch axes share."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
