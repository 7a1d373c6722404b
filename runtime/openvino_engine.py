"""OpenVINO behind the engine seam, on the CPU, over the same graphs as ONNX Runtime.

Every network is compiled for one batch size at a time, when that size is first asked for: with a free batch axis the
denoiser takes about twice as long.

In bfloat16 times and guidance scales must not be rounded before their sine and cosine are taken: 999 becomes 1000, and
the denoiser's error grows fivefold. That head of the graph is cut off and runs in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.models.bundle import Bundle

from .engine import DECODER, DENOISER, TEXT, Capabilities
from .errors import EngineFailed, EngineUnavailable
from .manifest import Graph, checked_files, read_manifest

BATCH_SIZES = (1, 2, 4, 8)
PRECISIONS = {"fp32": "f32", "bf16": "bf16"}
"""Ours -> OpenVINO's."""


class OpenVINOEngine:
    """Runs the exported graphs on the CPU. An output is valid until the next call of the same role.

    threads: CPU threads of a call; None takes torch's count. precision: "fp32", or "bf16", faster at relative errors
    near 1e-2; each is an engine kind of its own ("openvino", "openvino-bf16") with a verification of its own.

    Errors: `EngineUnavailable` where the package or a file is missing, files and weights do not match, or this CPU
    lacks the precision.
    """

    def __init__(self, bundle: Bundle, *, threads: int | None = None, precision: str = "fp32") -> None:
        if precision not in PRECISIONS:
            raise EngineUnavailable(f"precision is {precision!r}; use {' or '.join(PRECISIONS)}")
        self._openvino = _openvino()
        self.name = "openvino" if precision == "fp32" else f"openvino-{precision}"
        manifest = read_manifest(bundle, self.name)
        self._files = checked_files(bundle, manifest)
        self._graphs = manifest.roles
        self._core = self._openvino.Core()
        self._settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
            "ENABLE_CPU_PINNING": False,  # pinned replicas on one machine would share their first cores
        }
        self._precision = PRECISIONS[precision]
        self._networks: dict[tuple[str, int], _Network] = {}
        self._closed = False
        self.capabilities = Capabilities(
            roles=frozenset(manifest.roles),
            max_batch=BATCH_SIZES[-1],
            batch_sizes=BATCH_SIZES,
            takes_w=DENOISER in manifest.roles and any(p.name == "w" for p in manifest.roles[DENOISER].inputs),
        )
        for role in (TEXT, DENOISER, DECODER):
            if role in self._files:
                self._network(role, 1)

    def run(self, role: str, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        batch = next(iter(feeds.values())).shape[0]
        if self._closed or role not in self._files or batch not in BATCH_SIZES:
            able = "nothing: it is closed" if self._closed else f"{', '.join(sorted(self._files))} for {BATCH_SIZES}"
            raise EngineFailed(f"engine {self.name} cannot run {role!r} for a batch of {batch}; it runs {able}")
        network = self._network(role, batch)
        try:
            return network.run({name: tensor.detach().contiguous() for name, tensor in feeds.items()})
        except Exception as error:  # its own exceptions share no class of their own
            raise EngineFailed(f"engine {self.name} broke in {role!r}: {error}") from error

    def close(self) -> None:
        self._closed = True
        self._networks.clear()

    def _network(self, role: str, batch: int) -> "_Network":
        if (role, batch) not in self._networks:
            try:
                self._networks[role, batch] = self._compile(role, batch)
            except RuntimeError as error:
                raise EngineUnavailable(f"{self._files[role]} cannot be compiled by OpenVINO: {error}") from error
        return self._networks[role, batch]

    def _compile(self, role: str, batch: int) -> "_Network":
        model = self._core.read_model(self._files[role])
        model.reshape({port.name: self._shape(port.shape, batch) for port in self._graphs[role].inputs})
        head = split_head(model) if self._precision != "f32" else None
        return _Network(
            graph=self._graphs[role],
            openvino=self._openvino,
            head=None if head is None else self._request(head, "f32"),
            body=self._request(model, self._precision),
        )

    def _shape(self, shape: tuple[int | str, ...], batch: int) -> Any:
        lengths = [length if isinstance(length, int) else -1 for length in shape]
        return self._openvino.PartialShape([batch, *lengths[1:]])

    def _request(self, model: Any, precision: str) -> Any:
        settings = {**self._settings, "INFERENCE_PRECISION_HINT": precision}
        compiled = self._core.compile_model(model, "CPU", settings)
        active = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if active != precision:
            raise EngineUnavailable(f"this CPU computes in {active}, not {precision}; export with --precision fp32")
        return compiled.create_infer_request()


def open_bf16(bundle: Bundle, *, threads: int | None = None) -> OpenVINOEngine:
    """The engine kind "openvino-bf16"."""
    return OpenVINOEngine(bundle, threads=threads, precision="bf16")


@dataclass(frozen=True)
class _Network:
    """One role compiled for one batch size: in bfloat16 the float32 head comes first and feeds the body."""

    graph: Graph
    openvino: Any
    head: Any
    body: Any

    def run(self, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        if set(feeds) != {port.name for port in self.graph.inputs}:
            raise ValueError(f"it was fed {sorted(feeds)}; it takes {[port.name for port in self.graph.inputs]}")
        if self.head is not None:
            _infer(self.openvino, self.head, feeds)
            for k in range(len(self.head.model_outputs)):
                self.body.set_tensor(WAVE.format(k), self.head.get_output_tensor(k))
        _infer(self.openvino, self.body, feeds)
        return tuple(torch.from_numpy(self.body.get_output_tensor(k).data) for k in range(len(self.graph.outputs)))


WAVE = "wave_{}"


def split_head(model: Any) -> Any:
    """Cut every sine and cosine, and what they are taken of, off `model`, which gets them as inputs `wave_0`, ...

    Returns the cut part as a model of its own, with the waves as outputs in order, or None where there are none.
    """
    import openvino
    from openvino import opset13

    waves = [op for op in model.get_ordered_ops() if op.get_type_name() in ("Sin", "Cos")]
    if not waves:
        return None
    sources = {op.get_friendly_name() for wave in waves for op in _upstream(wave)}
    scalars = [p for p in model.get_parameters() if p.get_friendly_name() in sources]
    head = openvino.Model([wave.output(0) for wave in waves], scalars, "head").clone()
    for k, wave in enumerate(waves):
        name = WAVE.format(k)
        entry = opset13.parameter(wave.get_output_partial_shape(0), openvino.Type.f32, name=name)
        entry.output(0).set_names({name})
        for target in wave.output(0).get_target_inputs():
            target.replace_source_output(entry.output(0))
        model.add_parameters([entry])
    for scalar in scalars:
        if not scalar.output(0).get_target_inputs():
            model.remove_parameter(scalar)
    return head


def _upstream(op: Any) -> list[Any]:
    """An operation and all it is computed from."""
    found = {op.get_friendly_name(): op}
    queue = [op]
    while queue:
        for entry in queue.pop().inputs():
            source = entry.get_source_output().get_node()
            if source.get_friendly_name() not in found:
                found[source.get_friendly_name()] = source
                queue.append(source)
    return list(found.values())


def _infer(openvino: Any, request: Any, feeds: Mapping[str, Tensor]) -> None:
    """Run a request on those feeds that it takes; their memory is read in place."""
    for entry in request.model_inputs:
        name = entry.get_any_name()
        if name in feeds:
            request.set_tensor(name, openvino.Tensor(feeds[name].numpy(), shared_memory=True))
    request.infer()


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise EngineUnavailable("openvino is not installed; pip install 'fewstep[openvino]'") from error
    return openvino
