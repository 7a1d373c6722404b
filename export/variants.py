"""Engines without files of their own: a manifest that binds another way to run the bundle's networks or ONNX graphs."""

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version

from fewstep.models.bundle import Bundle
from fewstep.runtime.engines.manifest import Manifest, over_graphs, write_manifest
from fewstep.runtime.errors import EngineUnavailable

from .onnx import export_onnx, usable_onnx

Progress = Callable[[str], None]


def export_variant(
    bundle: Bundle, *, engine: str, precision: str = "fp32", progress: Progress | None = None
) -> Manifest | None:
    """An unverified manifest for an engine of `fewstep.runtime.engines.compiled_engine`; None for torch itself in fp32.

    What is compiled or captured is made when the engine is opened, by the torch and on the device that are there then.

    Errors: `EngineUnavailable` where the folder cannot be written.
    """
    if engine == "torch" and precision == "fp32":
        return None
    manifest = Manifest(
        engine=engine if precision == "fp32" else f"{engine}-{precision}",
        precision=precision,
        opset=0,
        roles={},
        weights_digest=bundle.weights_digest,
        producers={"torch": version("torch")},
    )
    return _written(bundle, manifest)


def export_provider(
    bundle: Bundle, *, engine: str, precision: str = "fp32", progress: Progress | None = None
) -> Manifest:
    """An unverified manifest for another provider of ONNX Runtime over the ONNX graphs, exporting these where needed.

    Errors: `EngineUnavailable` where a package is missing, the precision is not fp32 or the folder cannot be written.
    """
    if precision != "fp32":
        raise EngineUnavailable(f"precision is {precision!r}; the engine {engine!r} has fp32")
    source = usable_onnx(bundle) or export_onnx(bundle, progress=progress)
    roles = {role: replace(graph, file=f"../onnx/{graph.file}") for role, graph in source.roles.items()}
    return _written(bundle, over_graphs(source, engine, roles=roles))


def _written(bundle: Bundle, manifest: Manifest) -> Manifest:
    try:
        write_manifest(bundle, manifest)
    except OSError as error:
        raise EngineUnavailable(f"{bundle.root} cannot be written ({error}); export a copy that you own") from error
    return manifest
