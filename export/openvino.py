"""The OpenVINO engine of a bundle: no files of its own, a manifest that binds it to the ONNX graphs and a precision."""

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fewstep.models.bundle import Bundle
from fewstep.runtime.engines.manifest import Graph, Manifest, checked_files, over_graphs, write_manifest
from fewstep.runtime.engines.openvino_engine import PRECISIONS, Compiler, RoleNetworks
from fewstep.runtime.errors import EngineUnavailable

from .onnx import export_onnx, usable_onnx
from .parity import SAME, apart
from .quantise import quantise
from .quantise_options import int8_settings
from .verify import TOLERANCE, random_rows, rounded_bounds


def export_openvino(
    bundle: Bundle, *, precision: str = "fp32", progress: Callable[[str], None] | None = None, **options: Any
) -> Manifest:
    """Write an unverified manifest for the engine "openvino" ("openvino-bf16"), exporting to ONNX first where needed;
    for int8, quantise with the options of `quantise_options`. In bf16 a role that would miss its tolerance stays fp32.

    Errors: `EngineUnavailable` where OpenVINO is missing, the precision is unknown, an option is not of the precision,
    or the folder cannot be written.
    """
    if precision not in PRECISIONS:
        raise EngineUnavailable(f"precision is {precision!r}; the engine 'openvino' has {', '.join(PRECISIONS)}")
    settings = int8_settings(precision, options)
    if precision == "int8":
        from .quantise_openvino import kit

        return quantise(bundle, kit(), progress=progress, **settings)
    try:
        producer = version("openvino")
    except PackageNotFoundError as error:
        raise EngineUnavailable("openvino is not installed; pip install 'fewstep[openvino]'") from error
    source = usable_onnx(bundle) or export_onnx(bundle, progress=progress)
    manifest = over_graphs(
        source,
        "openvino" if precision == "fp32" else f"openvino-{precision}",
        precision=precision,
        roles={role: replace(graph, file=f"../onnx/{graph.file}") for role, graph in source.roles.items()},
        treatments={} if precision == "fp32" else rounded_where_it_agrees(bundle, source),
        producers={**source.producers, "openvino": producer},
    )
    try:
        write_manifest(bundle, manifest)
    except OSError as error:
        raise EngineUnavailable(f"{bundle.root} cannot be written ({error}); export a copy that you own") from error
    return manifest


def rounded_where_it_agrees(bundle: Bundle, source: Manifest) -> dict[str, str]:
    """Role -> the fastest of "bf16", "bf16-sums" and "fp32" whose outputs stay within the tolerance.

    Errors: `EngineUnavailable` where this CPU has no bfloat16.
    """
    compiler, files = Compiler(), checked_files(bundle, source)

    def agrees(role: str, graph: Graph, treatment: str) -> bool:
        exact, rounded = (RoleNetworks(compiler, graph, files[role], name).of(1) for name in ("fp32", treatment))
        worst = SAME
        for row in random_rows(bundle, role):
            wanted = [out.clone() for out in exact.run(row)]
            worst |= apart(rounded.run(row), wanted)
        bounds = rounded_bounds("bf16", TOLERANCE["bf16"], role)
        return worst.relative <= bounds.relative and worst.peak <= bounds.peak

    return {
        role: next((t for t in ("bf16", "bf16-sums") if agrees(role, graph, t)), "fp32")
        for role, graph in source.roles.items()
    }
