"""ONNX graphs that compute in float16 or bfloat16 and take and give float32, each proven close before it is used.

The graph is exported from the network in that type; a converter of finished graphs would round times before their sine
and cosine are taken. ONNX Runtime runs a float16 graph itself. It has no bfloat16 kernels on the CPU, so of a bfloat16
graph two things are shown: the graph with its types widened to float32, in ONNX Runtime, and the rounding, in torch.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.bundle import Bundle
from fewstep.runtime.engines.manifest import (
    Graph,
    Manifest,
    Parity,
    checked_files,
    engine_folder,
    read_manifest,
    write_manifest,
)  # fmt: skip
from fewstep.runtime.engines.ort_engine import run_on_cpu, session_options
from fewstep.runtime.errors import EngineUnavailable

from .graphs import RoleGraph, role_graph
from .onnx import EXTERNAL_OVER_BYTES, OPSET, export_role
from .parity import apart

Progress = Callable[[str], None]
PRODUCERS = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = 2e-2
"""Of one network in half precision, relative (`fewstep.export.parity`)."""
KEPT = ("size_ids",)
"""Inputs that only enter sines and cosines, beside those of one number per row (times, scales): they stay float32."""


class InHalf(nn.Module):
    """A network of positional tensors in half precision behind float32 inputs and outputs. It changes the network."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module = module.to(dtype)
        self.dtype = dtype
        self.names = names

    def forward(self, *feeds: Tensor) -> tuple[Tensor, ...]:
        rounded = [self._rounded(name, feed) for name, feed in zip(self.names, feeds, strict=True)]
        found = self.module(*rounded)
        return tuple(out.float() for out in (found if isinstance(found, tuple) else (found,)))

    def _rounded(self, name: str, feed: Tensor) -> Tensor:
        kept = name in KEPT or feed.ndim == 1 or not feed.is_floating_point()
        return feed if kept else feed.to(self.dtype)


def half_graphs(bundle: Bundle, precision: str, roles: Sequence[str], tell: Progress) -> Manifest:
    """Graphs in "fp16" or "bf16", `engines/tensorrt-<precision>/graphs/`, made and proven where missing or stale.

    Errors: `EngineUnavailable` as `export_half`.
    """
    if precision not in DTYPES:
        raise EngineUnavailable(f"precision is {precision!r}; the engine 'tensorrt' has fp32, {', '.join(DTYPES)}")
    kind, producers = f"tensorrt-{precision}/graphs", {name: version(name) for name in PRODUCERS}
    known = _usable(bundle, kind)
    if known is not None and known.producers == producers and set(roles) <= set(known.roles):
        return known
    folder = engine_folder(bundle, kind)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)  # graphs in the making have no manifest
    graphs: dict[str, Graph] = {}
    parity: list[Parity] = []
    for role in roles:
        tell(f"{role}: graph in {precision}")
        graphs[role], rows = export_half(role_graph(bundle, role), folder, precision)
        parity += rows
    manifest = Manifest(
        engine=kind,
        precision=precision,
        opset=OPSET,
        roles=graphs,
        weights_digest=bundle.weights_digest,
        producers=producers,
        parity=tuple(parity),
    )
    write_manifest(bundle, manifest)
    return manifest


def _usable(bundle: Bundle, kind: str) -> Manifest | None:
    try:
        manifest = read_manifest(bundle, kind)
        checked_files(bundle, manifest)
    except EngineUnavailable:
        return None
    return manifest


def export_half(graph: RoleGraph, folder: Path, precision: str) -> tuple[Graph, tuple[Parity, ...]]:
    """Write one role's graph in "fp16" or "bf16" and compare it with the network in float32, on a batch of three.

    Errors: `EngineUnavailable` where it cannot be exported, cannot be run, or is off by more than `TOLERANCE`.
    """
    feeds = {name: torch.cat([value, value[:1]]) for name, value in graph.feeds.items()}
    wanted = _outputs(graph.module, feeds)
    half = InHalf(graph.module, DTYPES[precision], tuple(graph.feeds)).eval()
    written = export_role(replace(graph, module=half), folder)
    errors = {graph.role: _error(_run_graph(folder / written.file, precision, feeds), wanted)}
    if precision == "bf16":
        errors[f"{graph.role} in torch"] = _error(_outputs(half, feeds), wanted)
    for component, error in errors.items():
        if not error <= TOLERANCE:
            raise EngineUnavailable(
                f"{component} in {precision} is off by {error:.1e} relative, over the {TOLERANCE:.0e} allowed; use "
                f"--precision {'bf16' if precision == 'fp16' else 'fp32'}"
            )
    parity = (Parity(component=c, max_relative_error=e, tolerance=TOLERANCE, ok=True) for c, e in errors.items())
    return written, tuple(parity)


@torch.no_grad()
def _outputs(module: Callable[..., Any], feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    found = module(*feeds.values())
    return found if isinstance(found, tuple) else (found,)


def _error(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    return apart(found, wanted).relative


def _run_graph(file: Path, precision: str, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = file if precision == "fp16" else _save_widened(file, Path(folder) / file.name)
        try:
            session = onnxruntime.InferenceSession(str(path), session_options(onnxruntime, None))
            return run_on_cpu(session, feeds)
        except Exception as error:  # its own exceptions share no class of their own
            raise EngineUnavailable(f"ONNX Runtime cannot run {file}: {error}") from error


def _save_widened(file: Path, path: Path) -> Path:
    import onnx

    proto = onnx.load(file)
    widen_bfloat16(proto)
    onnx.save_model(proto, path, save_as_external_data=proto.ByteSize() > EXTERNAL_OVER_BYTES)
    return path


def widen_bfloat16(proto: Any) -> None:
    """Make every bfloat16 of a graph a float32: weights keep their rounded values, arithmetic no longer rounds."""
    from onnx import TensorProto, numpy_helper

    def widen(tensor: Any) -> None:
        if tensor.data_type == TensorProto.BFLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float32"), tensor.name))

    for weight in proto.graph.initializer:
        widen(weight)
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
            if attribute.HasField("t"):
                widen(attribute.t)
