"""Eight bits through ONNX Runtime's own quantiser: weights alone, dynamic, or static after calibration."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fewstep.models.bundle import Bundle
from fewstep.models.files import sha256_of
from fewstep.runtime.engines.manifest import Graph, Manifest
from fewstep.runtime.engines.ort_engine import run_on_cpu, session_options
from fewstep.runtime.errors import EngineUnavailable

from .onnx import Progress, export_onnx
from .quantise import Kit, Run, Source, quantise
from .quantise_options import int8_settings

MADE = {"weight-only": ("int8-weights",), "dynamic": ("int8-dynamic",), "static": ("int8",)}
PRODUCTS = ["MatMul", "Gemm"]


def export_onnx_precision(
    bundle: Bundle,
    *,
    precision: str = "fp32",
    graphs: Sequence[str] = (),
    progress: Progress | None = None,
    **options: Any,
) -> Manifest:
    """`export_onnx`, or `quantise` for int8.

    Errors: theirs; `EngineUnavailable` for an option of int8 with another precision, or the other way round.
    """
    settings = int8_settings(precision, options)
    if precision != "int8":
        return export_onnx(bundle, precision=precision, graphs=graphs, progress=progress)
    if graphs:
        raise EngineUnavailable("--graphs belongs to --precision fp32; int8 follows the graphs that are there")
    return quantise(bundle, kit(), progress=progress, **settings)


def kit() -> Kit:
    """Errors: `EngineUnavailable` where ONNX Runtime is missing."""
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineUnavailable("onnxruntime is not installed; pip install 'fewstep[export]'") from error

    def make(source: Source, treatment: str, folder: Path) -> Graph:
        path = folder / f"{source.role.replace('+', '_')}.{treatment}.onnx"
        with _quiet():
            {"int8-weights": _weights, "int8-dynamic": _dynamic, "int8": _static}[treatment](source, path)
        return Graph(file=path.name, sha256=sha256_of(path), inputs=source.graph.inputs, outputs=source.graph.outputs)

    def open_role(graph: Graph, file: Path, treatment: str) -> Run:
        session = onnxruntime.InferenceSession(
            str(file), session_options(onnxruntime, None), providers=["CPUExecutionProvider"]
        )
        return lambda feeds: run_on_cpu(session, feeds)

    return Kit(
        engine="onnx",
        untouched=("fp32",),
        made=MADE,
        make=make,
        open=open_role,
        producers=lambda: {"onnxruntime": version("onnxruntime")},
    )


def _weights(source: Source, path: Path) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True, bits=8)
    quantiser = MatMulNBitsQuantizer(onnx.load(source.file), bits=8, block_size=32, algo_config=config)
    quantiser.process()
    onnx.save(quantiser.model.model, path)


def _dynamic(source: Source, path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source.file, path, op_types_to_quantize=PRODUCTS, weight_type=QuantType.QInt8, per_channel=True,
                     extra_options=_float_by_default())  # fmt: skip


def _static(source: Source, path: Path) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    with TemporaryDirectory(prefix="fewstep-") as folder:
        quantize_static(
            source.file,
            path,
            _Reader(source),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", *PRODUCTS],
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            extra_options={**_float_by_default(), "QuantizeBias": False},
            calibration_cache_path=Path(folder) / "ranges",
        )


def _float_by_default() -> dict[str, Any]:
    """The exported graphs carry no shapes of inner tensors, from which the quantiser would read types."""
    import onnx

    return {"DefaultTensorType": onnx.TensorProto.FLOAT}


class _Reader:
    """Calibration rows as ONNX Runtime asks for them: one after the other, then None."""

    def __init__(self, source: Source) -> None:
        self._rows = iter(source.rows)

    def get_next(self) -> dict[str, Any] | None:
        row = next(self._rows, None)
        return None if row is None else {name: value.numpy() for name, value in row.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide a line per node, and the advice to run a preprocessing step, which these graphs do not need."""
    loggers = [logging.getLogger(name) for name in (None, "onnxruntime.quantization.matmul_nbits_quantizer")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
