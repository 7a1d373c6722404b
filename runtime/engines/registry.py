"""Open an engine by its kind. Packages of an engine are imported only when it is asked for."""

import importlib
import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fewstep.models.bundle import Bundle

from ..engine import Engine
from ..errors import EngineUnavailable
from .manifest import read_manifest

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What opens an engine: `fewstep.runtime<module>:<function>(bundle, threads=..., **settings)`.

    package: what must be installed. cuda: whether it runs on a CUDA device only. settings: fixed by the kind.
    must_have_run: it was compiled where it may not run, and opens only once `fewstep verify` saw it run, or where it is
    told `allow_unproven=True`. compiles: opening it takes minutes, so it is opened by name only.
    """

    module: str
    function: str
    package: str
    cuda: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    must_have_run: bool = False
    compiles: bool = False


def _variant(kind: str, *, cuda: bool = False) -> Kind:
    return Kind(
        module=".compiled_engine",
        function="open_variant",
        package="torch",
        cuda=cuda,
        settings={"kind": kind},
        compiles="compile" in kind,
    )


def _onnx(kind: str, *, cuda: bool = False) -> Kind:
    return Kind(module=".ort_engine", function="OrtEngine", package="onnxruntime", cuda=cuda, settings={"kind": kind})


def _openvino(precision: str) -> Kind:
    settings = {"precision": precision}
    return Kind(module=".openvino_engine", function="OpenVINOEngine", package="openvino", settings=settings)


def _tensorrt(precision: str) -> Kind:
    """The package is `tensorrt` or `tensorrt_rtx`, as the manifest says: the engine itself looks for it."""
    return Kind(
        module=".tensorrt_engine",
        function="TensorRTEngine",
        package="torch",
        cuda=True,
        settings={"precision": precision},
        must_have_run=True,
    )


def _aoti(kind: str) -> Kind:
    return Kind(module=".aoti_engine", function="AotiEngine", package="torch", settings={"kind": kind})


KINDS: dict[str, Kind] = {
    "torch": Kind(module=".torch_engine", function="TorchEngine", package="torch"),
    "onnx": _onnx("onnx"),
    "onnx-int8": _onnx("onnx-int8"),
    "openvino": _openvino("fp32"),
    "openvino-bf16": _openvino("bf16"),
    "openvino-int8": _openvino("int8"),
    "onnx-cuda": _onnx("onnx-cuda", cuda=True),
    "onnx-tensorrt": _onnx("onnx-tensorrt", cuda=True),
    "tensorrt": _tensorrt("fp32"),
    "tensorrt-fp16": _tensorrt("fp16"),
    "tensorrt-bf16": _tensorrt("bf16"),
    "aoti": _aoti("aoti"),
    "aoti-bf16": _aoti("aoti-bf16"),
    "torch-bf16": _variant("torch-bf16"),
    "torch-compile": _variant("torch-compile"),
    "torch-compile-bf16": _variant("torch-compile-bf16"),
    "torch-cudagraphs": _variant("torch-cudagraphs", cuda=True),
    "torch-cudagraphs-bf16": _variant("torch-cudagraphs-bf16", cuda=True),
    "torch-compile-cudagraphs": _variant("torch-compile-cudagraphs", cuda=True),
    "torch-compile-cudagraphs-bf16": _variant("torch-compile-cudagraphs-bf16", cuda=True),
}
"""Every engine by its kind, `<engine>[-<precision>]`. Of exports that nobody measured here, the first comes first."""


def open_engine(bundle: Bundle, kind: str = "auto", *, threads: int | None = None, **options: Any) -> Engine:
    """An engine for a bundle. options: what the engine's own opener takes beside `threads`.

    "auto" takes the verified engine that was measured to be the fastest on this machine
    (`fewstep.runtime.engines.choice`); one that cannot be opened here is passed over with a warning.

    Errors: `EngineUnavailable` naming the choices, the missing package or the missing export.
    """
    if kind == "auto":
        return _open_best(bundle, threads, options)
    if kind not in KINDS:
        raise EngineUnavailable(f"engine {kind!r} is unknown; use one of auto, {', '.join(KINDS)}")
    found = KINDS[kind]
    if options.get("allow_unproven") and not found.must_have_run:
        raise EngineUnavailable(f"allow_unproven is for engines built ahead for a GPU; {kind!r} is none: leave it out")
    if not installed(found.package):
        raise EngineUnavailable(
            f"engine {kind!r} needs the package {found.package}; install it, or use the engine 'torch'"
        )
    make: Callable[..., Engine] = getattr(importlib.import_module(found.module, __package__), found.function)
    return make(bundle, threads=threads, **found.settings, **options)


def usable_export(bundle: Bundle, kind: str) -> bool:
    """Whether `<bundle>/engines/<kind>` is verified and was made from the bundle's present weights."""
    try:
        manifest = read_manifest(bundle, kind)
    except EngineUnavailable:
        return False
    return manifest.verified and manifest.weights_digest == bundle.weights_digest


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _open_best(bundle: Bundle, threads: int | None, options: Mapping[str, Any]) -> Engine:
    from .choice import explain

    for candidate in explain(bundle, threads=threads):
        if not candidate.usable:
            continue
        unproven = KINDS[candidate.kind].must_have_run  # others have nothing to prove, so they take no such option
        own = {name: value for name, value in options.items() if name != "allow_unproven" or unproven}
        try:
            engine = open_engine(bundle, candidate.kind, threads=threads, **own)
        except EngineUnavailable as error:
            if candidate.kind == "torch":
                raise
            _log.warning("%s: engine %s is passed over: %s", bundle.name, candidate.kind, error)
            continue
        _log.log(
            logging.INFO if candidate.cost_s is not None or candidate.kind == "torch" else logging.WARNING,
            "%s: engine %s, %s", bundle.name, candidate.kind, candidate.why,
        )  # fmt: skip
        return engine
    raise EngineUnavailable(f"no engine can be opened for {bundle.name}; install torch")
