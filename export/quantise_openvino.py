"""Eight bits through NNCF, for the OpenVINO engine: weights alone, or weights and activations after calibration."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

from fewstep.models.files import sha256_of
from fewstep.models.roles import DECODER, ENCODER
from fewstep.runtime.engines.manifest import Graph
from fewstep.runtime.engines.openvino_engine import Compiler, RoleNetworks
from fewstep.runtime.errors import EngineUnavailable

from .quantise import Kit, Run, Source

MADE = {"weight-only": ("int8-weights",), "static": ("int8", "int8-bf16")}


def kit() -> Kit:
    """Errors: `EngineUnavailable` where a package is missing."""
    nncf, compiler = _nncf(), Compiler()
    has_bf16 = "BF16" in compiler.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    made = MADE if has_bf16 else {mode: names[:1] for mode, names in MADE.items()}

    def make(source: Source, treatment: str, folder: Path) -> Graph:
        name = "int8-weights" if treatment == "int8-weights" else "int8"
        path = folder / f"{source.role.replace('+', '_')}.{name}.xml"
        if not path.is_file():  # both static treatments run one graph
            model = compiler.core.read_model(source.file)
            with _quiet(nncf):
                quantised = _weights(nncf, model) if name == "int8-weights" else _static(nncf, model, source)
            _save(compiler, quantised, path)
        return Graph(
            file=path.name,
            sha256=sha256_of(path),
            data_sha256=sha256_of(path.with_name(path.name + ".data")),
            inputs=source.graph.inputs,
            outputs=source.graph.outputs,
        )

    def open_role(graph: Graph, file: Path, treatment: str) -> Run:
        return RoleNetworks(compiler, graph, file, treatment).of(1).run

    return Kit(
        engine="openvino",
        untouched=("fp32", "bf16") if has_bf16 else ("fp32",),
        made=made,
        make=make,
        open=open_role,
        producers=lambda: {name: version(name) for name in ("openvino", "nncf")},
    )


def _weights(nncf: Any, model: Any) -> Any:
    return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)


def _static(nncf: Any, model: Any, source: Source) -> Any:
    """Every calibration row counts. Networks with attention get the scheme that keeps its softmax exact."""
    rows = [{name: value.numpy() for name, value in row.items()} for row in source.rows]
    convolutional = source.role in (DECODER, ENCODER)
    return nncf.quantize(
        model,
        nncf.Dataset(rows),
        subset_size=len(rows),
        model_type=None if convolutional else nncf.ModelType.TRANSFORMER,
    )


def _save(compiler: Compiler, model: Any, path: Path) -> None:
    weights = path.with_name(path.name + ".data")
    plain = path.with_suffix(".bin")
    compiler.openvino.serialize(model, path, plain)
    plain.rename(weights)


@contextmanager
def _quiet(nncf: Any) -> Iterator[None]:
    """Hide progress bars and remarks: the export has a bar of its own."""
    logger = logging.getLogger("nncf")
    level = logger.level
    nncf.set_log_level(logging.ERROR)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        nncf.set_log_level(level)


def _nncf() -> Any:
    try:
        import nncf
    except ImportError as error:
        raise EngineUnavailable("nncf is not installed; pip install 'fewstep[int8]'") from error
    return nncf
