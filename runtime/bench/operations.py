"""How many operations a network call takes: counted by torch's own counter, with the attention kernels it misses."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def count_operations(call: Callable[[], object]) -> int:
    """Floating-point operations of matrix products, convolutions and attention in one call (a fused one is two)."""
    mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        call()
    return int(counter.get_total_flops())


def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Shapes [B, heads, length, width]: the products Q K^T and (..) V."""
    batch, heads, length, width = query
    return int(2 * batch * heads * length * key[-2] * (width + value[-1]))
