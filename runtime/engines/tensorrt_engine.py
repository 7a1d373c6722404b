"""TensorRT behind the engine seam: serialized engines of `<bundle>/engines/tensorrt[-precision]/` on a CUDA device.

For every role and every set of shapes there is one execution context with its profile, shapes and addresses set once; a
call copies its feeds in and enqueues. All contexts share one block of scratch memory, since calls come one at a time.

An engine that has not run on any GPU is not trusted: it is opened only where told (`allow_unproven`), which `fewstep
verify` does. It alone writes `executed_on`, after every comparison with torch passed.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.models.bundle import Bundle
from fewstep.models.files import write_whole

from ..engine import DECODER, DENOISER, TEXT, Capabilities
from ..errors import EngineFailed, EngineUnavailable
from .cuda_device import CudaDevice, Device
from .manifest import Manifest, checked_files, engine_folder, export_command, read_manifest
from .tensorrt_flavour import TensorRT, load_tensorrt, said
from .tensorrt_profiles import Shapes, describe, describe_profiles, pick_profile, served_batches


class TensorRTEngine:
    """Runs serialized engines. An output is valid until the next call of the same role.

    threads: host threads that deserialize and refit; None leaves TensorRT's own count. precision: "fp32", "fp16" or
    "bf16". allow_unproven: open an engine that no GPU has run yet. cuda_graphs: capture each role and batch when it is
    first called; calls are then padded to the batch sizes that the engine was tuned for. device, tensorrt: None takes
    CUDA device 0 and the flavour that the engine was built with.

    Errors: `EngineUnavailable` where the package, the device or a file is missing, or the engine was built for other
    weights, another version or another device.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        precision: str = "fp32",
        allow_unproven: bool = False,
        cuda_graphs: bool = True,
        device: Device | None = None,
        tensorrt: TensorRT | None = None,
    ) -> None:
        self.name = "tensorrt" if precision == "fp32" else f"tensorrt-{precision}"
        manifest = read_manifest(bundle, self.name)
        build = _build_of(bundle, manifest)
        if manifest.executed_on is None and not allow_unproven:
            raise EngineUnavailable(
                f"the {self.name} engine of {bundle.name} has never run on a GPU; run `fewstep verify {bundle.root}` "
                "where it will serve, or say --allow-unproven"
            )
        self._tensorrt = tensorrt or load_tensorrt(build["flavour"])
        check_version(bundle, manifest, self._tensorrt)
        self._device = device or CudaDevice()
        check_device(bundle, manifest, self._device.identity())
        self._files = checked_files(bundle, manifest)
        self._graphs = manifest.roles
        self._cuda_graphs = cuda_graphs
        self._folder = engine_folder(bundle, self.name)
        self._errors: list[str] = []
        self._runtime = self._tensorrt.module.Runtime(self._tensorrt.logger(self._errors))
        if threads is not None:
            self._runtime.max_threads = threads
        self._engines: dict[str, Any] = {}
        self._configs: dict[str, Any] = {}
        self._programs: dict[tuple[str, Shapes], _Program] = {}
        self._scratch = torch.empty(0, dtype=torch.uint8, device=self._device.name)
        self._closed = False
        self.capabilities = Capabilities(
            roles=frozenset(manifest.roles),
            max_batch=max(most for _, _, most in build["batches"]),
            batch_sizes=served_batches(build["batches"], tuned_only=cuda_graphs),
            device=self._device.name,
            takes_w=manifest.takes("w"),
            takes_s=manifest.takes("s"),
            text_outputs=tuple(p.name for p in manifest.roles[TEXT].outputs) if TEXT in manifest.roles else (),
        )
        for role in (TEXT, DENOISER, DECODER):  # the rest is opened when first asked for
            if role in self._files:
                self._engine(role)

    def run(self, role: str, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        engine = self._engine(role)
        names = {port.name for port in self._graphs[role].inputs}
        if set(feeds) != names:
            raise EngineFailed(f"engine {self.name} was fed {sorted(feeds)} for {role!r}; it takes {sorted(names)}")
        shapes = tuple((name, tuple(feeds[name].shape)) for name in sorted(feeds))
        if (role, shapes) not in self._programs:
            self._programs[role, shapes] = self._program(role, engine, shapes)
        program = self._programs[role, shapes]
        for name, place in program.inputs.items():
            place.copy_(feeds[name], non_blocking=True)
        program.launch()
        return program.outputs

    def refit(self, role: str, weights: Mapping[str, Tensor]) -> None:
        """Give new values to weights of a role, by their names in its ONNX graph, without a build (merged LoRAs).

        Errors: `EngineFailed` where the engine was not built with refit or has no such weight; it then keeps its own.
        """
        trt = self._tensorrt.module
        refitter = trt.Refitter(self._engine(role), self._tensorrt.logger(self._errors))
        known = set(refitter.get_all_weights())
        if unknown := sorted(set(weights) - known):
            raise EngineFailed(
                f"engine {self.name} cannot refit {unknown[0]!r} of {role!r}: it can change {len(known)} weights; "
                "export it with --refit"
            )
        held = []  # TensorRT reads the memory when it refits, not before
        for name, value in weights.items():
            kind = refitter.get_weights_prototype(name).dtype
            array = value.detach().to("cpu", getattr(torch, TORCH_DTYPES[kind.name])).contiguous()
            held.append(array)
            if not refitter.set_named_weights(name, trt.Weights(kind, array.data_ptr(), array.numel())):
                raise EngineFailed(f"engine {self.name} refused {name!r} of {role!r}: {self._said()}")
        if missing := refitter.get_missing_weights():
            raise EngineFailed(f"engine {self.name} needs {sorted(missing)[:3]} of {role!r} refitted with the others")
        if not refitter.refit_cuda_engine():
            raise EngineFailed(f"engine {self.name} cannot refit {role!r}: {self._said()}")
        self._forget(role)

    def memory_bytes(self) -> dict[str, int]:
        """Bytes by what holds them: `engine:<role>`, `scratch` that roles share, `buffers` of inputs and outputs."""
        found = {f"engine:{role}": self._files[role].stat().st_size for role in self._engines}
        tensors = [t for p in self._programs.values() for t in (*p.inputs.values(), *p.outputs)]
        return found | {"scratch": self._scratch.numel(), "buffers": sum(t.nbytes for t in tensors)}

    def close(self) -> None:
        for role, config in self._configs.items():
            with suppress(OSError):  # a bundle that cannot be written is served too; its kernels are finished each time
                write_whole(self._cache(role), config.get_runtime_cache().serialize())
        self._closed = True
        for held in (self._programs, self._configs, self._engines):
            held.clear()

    def _engine(self, role: str) -> Any:
        if self._closed or role not in self._files:
            able = "nothing: it is closed" if self._closed else ", ".join(sorted(self._files))
            raise EngineFailed(f"engine {self.name} cannot run {role!r}; it runs {able}")
        if role not in self._engines:
            engine = self._runtime.deserialize_cuda_engine(self._files[role].read_bytes())
            if engine is None:
                raise EngineUnavailable(f"{self._tensorrt} cannot open {self._files[role]}: {self._said()}")
            self._engines[role] = engine
            if engine.device_memory_size_v2 > self._scratch.numel():
                self._forget(*self._engines)
                size = engine.device_memory_size_v2
                self._scratch = torch.empty(size, dtype=torch.uint8, device=self._device.name)
        return self._engines[role]

    def _forget(self, *roles: str) -> None:
        """Drop what was prepared for roles: their memory moved, or their weights changed."""
        self._programs = {key: program for key, program in self._programs.items() if key[0] not in roles}

    def _program(self, role: str, engine: Any, shapes: Shapes) -> "_Program":
        graph, device = self._graphs[role], self._device
        profile = pick_profile(engine, shapes)
        if profile is None:
            able = describe_profiles(engine, shapes)
            raise EngineFailed(f"engine {self.name} has no profile of {role!r} for {describe(shapes)}; {able}")
        try:
            context = self._context(role, engine)
            accepted = context.set_optimization_profile_async(profile, device.stream())
            accepted = accepted and all(context.set_input_shape(name, shape) for name, shape in shapes)
            if not accepted or context.infer_shapes():
                raise EngineFailed(f"engine {self.name} refused {describe(shapes)} for {role!r}: {self._said()}")
            inputs = {p.name: _buffer(p.dtype, dict(shapes)[p.name], device) for p in graph.inputs}
            outputs = {p.name: _buffer(p.dtype, context.get_tensor_shape(p.name), device) for p in graph.outputs}
            for name, tensor in (inputs | outputs).items():
                context.set_tensor_address(name, tensor.data_ptr())
            context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
        except RuntimeError as error:
            raise EngineFailed(f"engine {self.name} broke in {role!r}: {error}") from error

        def enqueue() -> None:
            if not context.execute_async_v3(device.stream()):
                raise EngineFailed(f"engine {self.name} broke in {role!r}: {self._said()}")

        launch: Callable[[], None] = enqueue
        if self._cuda_graphs and not self._tensorrt.flavour.own_graphs:
            enqueue()  # a context must have run once in its shapes before it can be captured
            launch = device.capture(enqueue)
        return _Program(context, inputs, tuple(outputs.values()), launch)

    def _context(self, role: str, engine: Any) -> Any:
        trt = self._tensorrt.module
        shared = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self._tensorrt.flavour.own_graphs:
            context = engine.create_execution_context(shared)
        else:
            if role not in self._configs:
                config = engine.create_runtime_config()
                config.set_execution_context_allocation_strategy(shared)
                strategy = trt.CudaGraphStrategy
                config.cuda_graph_strategy = strategy.WHOLE_GRAPH_CAPTURE if self._cuda_graphs else strategy.DISABLED
                cache = config.create_runtime_cache()
                if self._cache(role).is_file():
                    cache.deserialize(self._cache(role).read_bytes())  # it refuses those of another device or version
                config.set_runtime_cache(cache)
                self._configs[role] = config
            context = engine.create_execution_context(self._configs[role])
        if context is None:
            raise EngineFailed(f"engine {self.name} cannot prepare {role!r}: {self._said()}")
        return context

    def _cache(self, role: str) -> Path:
        return self._folder / f"{role.replace('+', '_')}.runtime_cache"

    def _said(self) -> str:
        message = said(self._errors)
        self._errors.clear()
        return message


@dataclass(frozen=True)
class _Program:
    """One role in one set of shapes, ready to run: where feeds go, what starts it, where its outputs will be."""

    context: Any
    inputs: Mapping[str, Tensor]
    outputs: tuple[Tensor, ...]
    launch: Callable[[], None]


TORCH_DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32", "BOOL": "bool",
}  # fmt: skip
"""TensorRT's names -> torch's."""


def check_version(bundle: Bundle, manifest: Manifest, tensorrt: TensorRT) -> None:
    """Errors: `EngineUnavailable` where an engine was built by another flavour or version than the one here."""
    built = f"{(manifest.build or {})['flavour']} {(manifest.build or {})['version']}"
    if built != str(tensorrt):
        raise EngineUnavailable(
            f"the {manifest.engine} engine of {bundle.name} was built by {built} and {tensorrt} is installed; "
            f"run `{export_command(bundle, manifest.engine)}`"
        )


def check_device(bundle: Bundle, manifest: Manifest, here: Mapping[str, str]) -> None:
    """Errors: `EngineUnavailable` where an engine that is bound to a device was built for another one."""
    built = (manifest.build or {})["device"]
    if built is not None and dict(built) != dict(here):
        raise EngineUnavailable(
            f"the {manifest.engine} engine of {bundle.name} was built for {_device(built)} and this is "
            f"{_device(here)}; run `{export_command(bundle, manifest.engine)}` here"
        )


def _device(identity: Mapping[str, str]) -> str:
    return f"{identity['device']} (compute capability {identity['capability']})"


def _buffer(dtype: str, shape: Any, device: Device) -> Tensor:
    """Zeros: the run before a capture reads them, and whatever lay in memory would be no token ids."""
    return torch.zeros(tuple(shape), dtype=getattr(torch, dtype), device=device.name)


def _build_of(bundle: Bundle, manifest: Manifest) -> Mapping[str, Any]:
    build = manifest.build or {}
    if missing := {"flavour", "version", "device", "batches"} - set(build):
        raise EngineUnavailable(
            f"the manifest of the {manifest.engine} engine of {bundle.name} does not say its {sorted(missing)[0]}; "
            f"run `{export_command(bundle, manifest.engine)}`"
        )
    return build
