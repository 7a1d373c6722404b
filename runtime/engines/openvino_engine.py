"""OpenVINO behind the engine seam, on the CPU, over the same graphs as ONNX Runtime or quantised ones of its own.

Every network is compiled for one batch size at a time, when that size is first asked for: with a free batch axis the
denoiser takes about twice as long.

Each role has a treatment: the precision it computes in. The engine kinds `openvino` and `openvino-bf16` treat all roles
alike; in `openvino-int8` each role has what its manifest says.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.models.bundle import Bundle

from ..engine import DECODER, DENOISER, TEXT, Capabilities
from ..errors import EngineFailed, EngineUnavailable
from .manifest import Graph, checked_files, read_manifest
from .openvino_graph import WAVE, keep_sums, norms_by_channel, split_head

BATCH_SIZES = (1, 2, 4, 8)
PRECISIONS = ("fp32", "bf16", "int8")
TREATMENTS = {
    "fp32": "f32",
    "bf16": "bf16",
    "bf16-sums": "bf16",
    "int8": "f32",
    "int8-bf16": "bf16",
    "int8-weights": "f32",
}
"""What may be done to a role -> OpenVINO's name for what its unquantised operations compute in.

bf16-sums: sums stay in float32, closer and a little slower; int8: weights and activations of convolutions and products
in 8 bits; int8-bf16: the same, and bfloat16 elsewhere; int8-weights: weights alone are stored in 8 bits.
"""

LARGE = {"f32": 32 * 32, "bf16": 64 * 64}
"""Positions of a picture from which its group norms are faster channel by channel, measured: below, one call of
OpenVINO's own norm costs less than the dozen small ones that stand for it."""


class OpenVINOEngine:
    """Runs the exported graphs on the CPU. An output is valid until the next call of the same role.

    threads: CPU threads of a call; None takes torch's count. precision: "fp32", "bf16" or "int8"; each is an engine
    kind of its own ("openvino", "openvino-bf16", "openvino-int8") with a verification of its own.

    Errors: `EngineUnavailable` where the package or a file is missing, files and weights do not match, or this CPU
    lacks the precision.
    """

    def __init__(self, bundle: Bundle, *, threads: int | None = None, precision: str = "fp32") -> None:
        if precision not in PRECISIONS:
            raise EngineUnavailable(f"precision is {precision!r}; use {', '.join(PRECISIONS)}")
        self.name = "openvino" if precision == "fp32" else f"openvino-{precision}"
        manifest = read_manifest(bundle, self.name)
        files = checked_files(bundle, manifest)
        compiler = Compiler(threads)
        self._roles = {
            role: RoleNetworks(compiler, graph, files[role], manifest.treatments.get(role, precision))
            for role, graph in manifest.roles.items()
        }
        self._closed = False
        self.capabilities = Capabilities(
            roles=frozenset(manifest.roles),
            max_batch=BATCH_SIZES[-1],
            batch_sizes=BATCH_SIZES,
            takes_w=manifest.takes("w"),
            takes_s=manifest.takes("s"),
            text_outputs=tuple(p.name for p in manifest.roles[TEXT].outputs) if TEXT in manifest.roles else (),
        )
        for role in (TEXT, DENOISER, DECODER):
            if role in self._roles:
                self._roles[role].of(1)

    def run(self, role: str, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        batch = next(iter(feeds.values())).shape[0]
        if self._closed or role not in self._roles or batch not in BATCH_SIZES:
            able = "nothing: it is closed" if self._closed else f"{', '.join(sorted(self._roles))} for {BATCH_SIZES}"
            raise EngineFailed(f"engine {self.name} cannot run {role!r} for a batch of {batch}; it runs {able}")
        network = self._roles[role].of(batch)
        try:
            return network.run({name: tensor.detach().contiguous() for name, tensor in feeds.items()})
        except Exception as error:  # its own exceptions share no class of their own
            raise EngineFailed(f"engine {self.name} broke in {role!r}: {error}") from error

    def close(self) -> None:
        self._closed = True
        self._roles.clear()


class Compiler:
    """OpenVINO's CPU compiler with this runtime's settings. threads: as the engine's.

    Errors: `EngineUnavailable` where the package is missing.
    """

    def __init__(self, threads: int | None = None) -> None:
        try:
            import openvino
        except ImportError as error:
            raise EngineUnavailable("openvino is not installed; pip install 'fewstep[openvino]'") from error
        self.openvino: Any = openvino
        self.core: Any = openvino.Core()
        self._settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
            "ENABLE_CPU_PINNING": False,  # pinned replicas on one machine would share their first cores
        }

    def request(self, model: Any, precision: str) -> Any:
        """A compiled model's inference request. precision: OpenVINO's name.

        Errors: `EngineUnavailable` where this CPU computes in another.
        """
        compiled = self.core.compile_model(model, "CPU", {**self._settings, "INFERENCE_PRECISION_HINT": precision})
        active = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if active != precision:
            raise EngineUnavailable(f"this CPU computes in {active}, not {precision}; export with --precision fp32")
        return compiled.create_infer_request()


class RoleNetworks:
    """One role's graph file under one treatment, compiled for each batch size when first asked for."""

    def __init__(self, compiler: Compiler, graph: Graph, file: Path, treatment: str) -> None:
        if treatment not in TREATMENTS:
            raise EngineUnavailable(f"{file}: treatment is {treatment!r}; this release knows {', '.join(TREATMENTS)}")
        self._compiler = compiler
        self._graph = graph
        self._file = file
        self._treatment = treatment
        self._networks: dict[int, Network] = {}

    def of(self, batch: int) -> "Network":
        """Errors: `EngineUnavailable` where OpenVINO cannot compile the file, or the CPU lacks the precision."""
        if batch not in self._networks:
            try:
                self._networks[batch] = self._compile(batch)
            except RuntimeError as error:
                raise EngineUnavailable(f"{self._file} cannot be compiled by OpenVINO: {error}") from error
        return self._networks[batch]

    @cached_property
    def _model(self) -> Any:
        core = self._compiler.core
        if self._graph.data_sha256 is not None and self._file.suffix == ".xml":
            return core.read_model(self._file, self._file.with_name(self._file.name + ".data"))
        model = core.read_model(self._file)
        return keep_sums(core, model) if self._treatment == "bf16-sums" else model

    def _compile(self, batch: int) -> "Network":
        compiler, precision = self._compiler, TREATMENTS[self._treatment]
        model = self._model.clone()
        model.reshape({port.name: self._shape(port.shape, batch) for port in self._graph.inputs})
        norms_by_channel(model, LARGE[precision])
        head = split_head(model) if precision != "f32" else None
        return Network(
            self._graph,
            compiler.openvino,
            head=None if head is None else compiler.request(head, "f32"),
            body=compiler.request(model, precision),
        )

    def _shape(self, shape: tuple[int | str, ...], batch: int) -> Any:
        lengths = [length if isinstance(length, int) else -1 for length in shape]
        return self._compiler.openvino.PartialShape([batch, *lengths[1:]])


class Network:
    """One role compiled for one batch size: in bfloat16 the float32 head comes first and feeds the body.

    Inputs of known shapes are copied into memory that stays bound to the request: at small networks, binding a tensor
    anew at each call costs more than the arithmetic of a layer.
    """

    def __init__(self, graph: Graph, openvino: Any, head: Any, body: Any) -> None:
        self.graph, self.head, self.body = graph, head, body
        self._openvino = openvino
        self._wanted = {port.name for port in graph.inputs}
        self._bound = _bind(head, body, self._wanted) if _static(head) and _static(body) else None
        if self._bound is not None and head is not None:
            self._join()

    def run(self, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Contiguous feeds by name to outputs in the graph's order, which stay valid until the next call.

        Errors: ValueError where feeds are missing or unknown; OpenVINO's own.
        """
        if set(feeds) != self._wanted:
            raise ValueError(f"it was fed {sorted(feeds)}; it takes {[port.name for port in self.graph.inputs]}")
        if self._bound is not None:
            for name, kept in self._bound:
                kept.copy_(feeds[name])
        else:
            self._share(feeds)
        if self.head is not None:
            self.head.infer()
            if self._bound is None:
                self._join()
        self.body.infer()
        return tuple(torch.from_numpy(self.body.get_output_tensor(k).data) for k in range(len(self.graph.outputs)))

    def _share(self, feeds: Mapping[str, Tensor]) -> None:
        """Let the requests read the feeds' own memory."""
        for part in (self.head, self.body):
            for entry in () if part is None else part.model_inputs:
                name = entry.get_any_name()
                if name in feeds:
                    part.set_tensor(name, self._openvino.Tensor(feeds[name].numpy(), shared_memory=True))

    def _join(self) -> None:
        """Let the body read what the head gives."""
        for k in range(len(self.head.model_outputs)):
            self.body.set_tensor(WAVE.format(k), self.head.get_output_tensor(k))


def _static(request: Any) -> bool:
    return request is None or all(entry.get_partial_shape().is_static for entry in request.model_inputs)


def _bind(head: Any, body: Any, wanted: set[str]) -> tuple[tuple[str, Tensor], ...]:
    """Each input's name with a torch view of the memory that a request reads; one that both take comes twice."""
    bound = []
    for part in (head, body):
        for entry in () if part is None else part.model_inputs:
            name = entry.get_any_name()
            if name in wanted:
                bound.append((name, torch.from_numpy(part.get_tensor(name).data)))
    return tuple(bound)
