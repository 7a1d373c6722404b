"""What a machine can do at most, measured: matrix products per second in a precision, bytes moved per second."""

import torch

from .measurement import call_seconds

SIDE = 2048
"""Of the matrices on a CPU; a GPU takes four times that."""


def matrix_peak(dtype: torch.dtype, *, device: str = "cpu", side: int | None = None, repeats: int = 5) -> float:
    """Operations per second (a multiplication and an addition are two) of the fastest of some square products."""
    size = side or (4 * SIDE if device.startswith("cuda") else SIDE)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / min(call_seconds(lambda: torch.mm(a, b, out=out), device, repeats=repeats))


def copy_bandwidth(*, device: str = "cpu", size_bytes: int = 1 << 28, repeats: int = 5) -> float:
    """Bytes per second, read and written, of the fastest copy of `size_bytes`, which no cache holds."""
    source = torch.zeros(size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size_bytes / min(call_seconds(lambda: target.copy_(source), device, repeats=repeats))
