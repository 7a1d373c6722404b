"""Open an engine by its kind. Packages of an engine are imported only when it is asked for."""

import importlib
import importlib.util
import json
from collections.abc import Callable

from fewstep.models.bundle import Bundle

from .engine import Engine
from .errors import EngineUnavailable

KINDS = {
    "torch": (".torch_engine", "TorchEngine", "torch"),
    "onnx": (".ort_engine", "OrtEngine", "onnxruntime"),
    "openvino": (".openvino_engine", "OpenVINOEngine", "openvino"),
    "openvino-bf16": (".openvino_engine", "open_bf16", "openvino"),
}
"""kind -> (module, what opens it, the package it needs)."""


def open_engine(bundle: Bundle, kind: str = "auto", *, threads: int | None = None) -> Engine:
    """An engine for a bundle. "auto": ONNX Runtime where the bundle holds a verified export of its weights, else torch.

    Errors: `EngineUnavailable` naming the choices, the missing package or the missing export.
    """
    if kind == "auto":
        kind = "onnx" if usable_export(bundle, "onnx") and _installed("onnxruntime") else "torch"
    if kind not in KINDS:
        raise EngineUnavailable(f"engine {kind!r} is unknown; use one of auto, {', '.join(KINDS)}")
    module, name, package = KINDS[kind]
    if not _installed(package):
        raise EngineUnavailable(f"engine {kind!r} needs the package {package}; install it, or use the engine 'torch'")
    make: Callable[..., Engine] = getattr(importlib.import_module(module, __package__), name)
    return make(bundle, threads=threads)


def usable_export(bundle: Bundle, kind: str) -> bool:
    """Whether `<bundle>/engines/<kind>` is verified and was made from the bundle's present weights."""
    try:
        manifest = json.loads((bundle.root / "engines" / kind / "manifest.json").read_text())
    except (OSError, ValueError):
        return False
    verified = isinstance(manifest, dict) and manifest.get("verified") is True
    return verified and manifest.get("weights_digest") == bundle.weights_digest


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
