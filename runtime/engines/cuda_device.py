"""What an engine needs of a CUDA device beside tensors: who it is, the stream at hand, and the capture of a call."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch

from ..errors import EngineUnavailable

if TYPE_CHECKING:
    from collections.abc import Mapping


class Device(Protocol):
    """A device that engines compiled ahead run on; tests put a recording one in its place."""

    @property
    def name(self) -> str:
        """As torch names it, such as "cuda:0"."""
        ...

    def identity(self) -> "Mapping[str, str]":
        """device (its model) and capability, such as "9.0"."""
        ...

    def stream(self) -> int:
        """The handle of the stream that torch works on now."""
        ...

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        """What replays the kernels that `call` enqueues on the stream at hand."""
        ...


def device_here() -> dict[str, str] | None:
    """Model and capability of this machine's first CUDA device; None where torch sees none."""
    return CudaDevice().identity() if torch.cuda.is_available() else None


class CudaDevice:
    """A CUDA device of torch.

    Errors: `EngineUnavailable` where torch sees none.
    """

    def __init__(self, index: int = 0) -> None:
        if not torch.cuda.is_available():
            raise EngineUnavailable(
                f"torch {torch.__version__} sees no CUDA device, which TensorRT needs; use --engine onnx here"
            )
        self.name = f"cuda:{index}"
        self._index = index

    def identity(self) -> dict[str, str]:
        major, minor = torch.cuda.get_device_capability(self._index)
        return {"device": torch.cuda.get_device_name(self._index), "capability": f"{major}.{minor}"}

    def stream(self) -> int:
        return int(torch.cuda.current_stream(self._index).cuda_stream)

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._index)
        with torch.cuda.graph(graph):
            call()
        return graph.replay
