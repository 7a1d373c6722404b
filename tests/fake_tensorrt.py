"""A TensorRT that records what is asked of it and doubles its first input: for control flow where no GPU is.

A "plan" is JSON: {"profiles": [{input: [least, usual, most]}], "inputs": [...], "outputs": {name: shape after the
batch}, "scratch": bytes, "weights": {name: count}}. Tensors are float32 in host memory at the addresses it is given.
Every public name here exists in the real module (tests/test_tensorrt_engine.py).
"""

import ctypes
import json
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np


class ILogger:
    ERROR, INTERNAL_ERROR, WARNING = "error", "internal error", "warning"


class Runtime:
    def __init__(self, logger: Any) -> None:
        self.logger = logger
        self.max_threads = 1

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> "ICudaEngine | None":
        if not serialized_engine.startswith(b"{"):
            self.logger.log(ILogger.WARNING, "about to read")
            self.logger.log(ILogger.ERROR, "magic tag does not match (In read at /_src/runtime/file.cpp:8)")
            return None
        return ICudaEngine(json.loads(serialized_engine), self.logger)


class ICudaEngine:
    def __init__(self, plan: dict, logger: Any) -> None:
        self._plan = plan
        self._logger = logger
        self._contexts: list[IExecutionContext] = []
        self.device_memory_size_v2 = plan["scratch"]
        self.num_optimization_profiles = len(plan["profiles"])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list:
        return self._plan["profiles"][profile_index][name]

    def create_runtime_config(self) -> "IRuntimeConfig":
        return IRuntimeConfig()

    def create_execution_context(self, strategy: Any) -> "IExecutionContext":
        self._contexts.append(IExecutionContext(self._plan, self._logger, strategy))
        return self._contexts[-1]


class IRuntimeConfig:
    def __init__(self) -> None:
        self.cuda_graph_strategy: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self._strategy = strategy

    def create_runtime_cache(self) -> "IRuntimeCache":
        return IRuntimeCache()

    def set_runtime_cache(self, cache: "IRuntimeCache") -> None:
        self._cache = cache

    def get_runtime_cache(self) -> "IRuntimeCache":
        return self._cache


class IRuntimeCache:
    _loaded = b""

    def deserialize(self, blob: bytes) -> bool:
        self._loaded = blob
        return True

    def serialize(self) -> bytes:
        return self._loaded + b"kernel;"


class IExecutionContext:
    def __init__(self, plan: dict, logger: Any, strategy: Any) -> None:
        self._plan, self._logger, self._strategy = plan, logger, strategy
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._runs: list[int] = []
        self._fed: list[np.ndarray] = []
        self._broken = False

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile = profile_index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self._plan["inputs"] if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        first = self._shapes[self._plan["inputs"][0]]
        return (first[0], *self._plan["outputs"][name])

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        self._scratch = (memory, size)

    def execute_async_v3(self, stream_handle: int) -> bool:
        if self._broken:
            self._logger.log(ILogger.ERROR, "out of luck")
            return False
        self._runs.append(stream_handle)
        first = self._plan["inputs"][0]
        source = _memory(self._addresses[first], self._shapes[first])
        self._fed.append(source.copy())
        for name in self._plan["outputs"]:
            target = _memory(self._addresses[name], self.get_tensor_shape(name))
            target[:] = 2 * source
        return True


class Refitter:
    _refitted: ClassVar[list[dict]] = []  # of every engine, in order

    def __init__(self, engine: ICudaEngine, logger: Any) -> None:
        self._plan = engine._plan
        self._logger = logger
        self._given: dict[str, np.ndarray] = {}

    def get_all_weights(self) -> list[str]:
        return list(self._plan["weights"])

    def get_weights_prototype(self, weights_name: str) -> Any:
        return SimpleNamespace(dtype=SimpleNamespace(name="FLOAT"))

    def set_named_weights(self, name: str, weights: "Weights") -> bool:
        if weights.size != self._plan["weights"][name]:
            self._logger.log(ILogger.ERROR, f"{name} has {self._plan['weights'][name]} values")
            return False
        self._given[name] = _memory(weights._address, (weights.size,)).copy()
        return True

    def get_missing_weights(self) -> list[str]:
        pairs = self._plan.get("fused", [])
        return [b for a, b in pairs if a in self._given and b not in self._given]

    def refit_cuda_engine(self) -> bool:
        self._refitted.append(self._given)
        return True


class Weights:
    def __init__(self, dtype: Any, address: int, count: int) -> None:
        self.dtype = dtype
        self.size = count
        self._address = address


class ExecutionContextAllocationStrategy:
    STATIC, USER_MANAGED = "static", "user managed"


class CudaGraphStrategy:
    DISABLED, WHOLE_GRAPH_CAPTURE = "disabled", "whole graph"


__version__ = "1.7.0"


class RecordingDevice:
    """A device in host memory that notes what is captured and replayed."""

    name = "cpu"

    def __init__(self, model: str = "Fake 100", capability: str = "9.0") -> None:
        self._identity = {"device": model, "capability": capability}
        self.captured = 0
        self.replayed = 0

    def identity(self) -> dict[str, str]:
        return self._identity

    def stream(self) -> int:
        return 7

    def capture(self, call: Any) -> Any:
        self.captured += 1
        call()

        def replay() -> None:
            self.replayed += 1
            call()

        return replay


def _memory(address: int, shape: tuple[int, ...]) -> np.ndarray:
    count = int(np.prod(shape))
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address)).reshape(shape)
