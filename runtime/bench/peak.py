"""What a machine can do at most, measured: matrix products per second in a precision, bytes moved per second."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..engines.measurement import call_seconds

SIDE = 2048
"""Of the matrices on a CPU; a GPU takes four times that."""


def matrix_peak(dtype: torch.dtype, *, device: str = "cpu", side: int | None = None, repeats: int = 5) -> float:
    """Operations per second (a multiplication and an addition are two) of the fastest of some square products.

    On a CPU OpenVINO's product is tried beside torch's, where it is installed: its kernels differ, and the faster of
    both is nearer to what the machine can do.
    """
    size = side or (4 * SIDE if device.startswith("cuda") else SIDE)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    calls: list[Callable[[], object]] = [lambda: torch.mm(a, b, out=out)]
    if device == "cpu" and (other := _openvino_product(b.float(), dtype)) is not None:
        calls.append(other)
    return 2 * size**3 / min(seconds for call in calls for seconds in call_seconds(call, device, repeats=repeats))


def _openvino_product(weights: Tensor, dtype: torch.dtype) -> Callable[[], object] | None:
    """A product with constant weights, as a network's layers are, by OpenVINO; None where it cannot do it."""
    from ..engines.openvino_engine import Compiler
    from ..errors import EngineUnavailable

    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}.get(dtype)
    if precision is None:
        return None
    try:
        compiler = Compiler()
        from openvino import Model, Type, opset13

        entry = opset13.parameter(weights.shape, Type.f32, name="x")
        product = Model([opset13.matmul(entry, opset13.constant(weights.numpy()), False, False)], [entry], "product")
        request = compiler.request(product, precision)
    except EngineUnavailable:  # not installed, or not in this precision on this CPU
        return None
    request.get_tensor("x").data[:] = weights.numpy()
    return lambda: request.infer()


def copy_bandwidth(*, device: str = "cpu", size_bytes: int = 1 << 28, repeats: int = 5) -> float:
    """Bytes per second, read and written, of the fastest copy of `size_bytes`, which no cache holds."""
    source = torch.zeros(size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size_bytes / min(call_seconds(lambda: target.copy_(source), device, repeats=repeats))
