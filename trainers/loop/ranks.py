"""Processes that train one student together: who this one is, and the little that they tell each other.

`torchrun --nproc-per-node N -m fewstep.runtime.cli distill ...` starts them. Each sees its rows of the joint batch
(`trainers.parts.objective.Part`) and holds all weights ("ddp": gradients are averaged after the backward pass) or a
share of each block's ("fsdp": PyTorch's fully sharded data parallel, whose hooks gather and scatter them).
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from ..networks.watch import stages_of
from ..parts.objective import Part

T = TypeVar("T")
CPU = torch.device("cpu")
MODES = ("ddp", "fsdp")
BUCKET = 1 << 25
"""Bytes of gradients that are averaged in one message."""
PATIENCE = timedelta(hours=6)
"""How long a process waits for another: the first encodes data and draws pairs alone."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run. sharded: "fsdp". bf16: shards of frozen and trained blocks are gathered so."""

    index: int = 0
    count: int = 1
    device: torch.device = CPU
    sharded: bool = False
    bf16: bool = False

    @property
    def part(self) -> Part:
        return Part(self.index, self.count)

    @property
    def first(self) -> bool:
        """Whether this process writes files."""
        return self.index == 0

    def wait(self) -> None:
        if self.count > 1:
            torch.distributed.barrier()

    def once(self, make: Callable[[], T]) -> T:
        """What the first process makes, told to all: small plain values. Its error is everybody's."""
        if self.count == 1:
            return make()
        told: list[Any] = [None, None]
        if self.first:
            try:
                told[0] = make()
            except Exception as error:
                told[1] = error
        torch.distributed.broadcast_object_list(told, src=0, device=self.device)
        if told[1] is not None:
            raise told[1]
        made: T = told[0]
        return made

    def first_then_all(self, make: Callable[[], T]) -> T:
        """Everybody makes it, the others after the first has, who may leave it in a file for them."""
        if self.count == 1:
            return make()
        made: list[T] = []
        self.once(lambda: made.append(make()))
        return made[0] if made else make()

    def mean(self, values: Sequence[float]) -> list[float]:
        """Of each value over the processes."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return [float(value) for value in total / self.count]

    def average_gradients(self, weights: Iterable[nn.Parameter]) -> None:
        """Of the weights that are whole here, in buckets; a weight that got none in any process keeps none."""
        if self.count == 1:
            return
        weights = [weight for weight in weights if not is_shard(weight)]
        got = torch.tensor([weight.grad is not None for weight in weights], dtype=torch.uint8, device=self.device)
        torch.distributed.all_reduce(got, op=torch.distributed.ReduceOp.MAX)
        gradients = []
        for weight, wanted in zip(weights, got.tolist(), strict=True):
            if wanted:
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                gradients.append(weight.grad)
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            torch.distributed.all_reduce(flat)
            parts = (flat / self.count).split([gradient.numel() for gradient in bucket])
            torch._foreach_copy_(bucket, [part.view_as(own) for part, own in zip(parts, bucket, strict=True)])

    def norm(self, weights: Iterable[nn.Parameter]) -> Tensor:
        """Of the gradients of all weights together, those of shards summed over the processes."""
        whole, shards = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        for weight in weights:
            if weight.grad is None:
                continue
            square = local(weight.grad).float().square().sum()
            whole, shards = (whole, shards + square) if is_shard(weight) else (whole + square, shards)
        torch.distributed.all_reduce(shards)
        return (whole + shards).sqrt()

    def spread(self, network: nn.Module) -> None:
        """The first process's weights for all; where sharded, each block then keeps its share of its own weights."""
        if self.count == 1:
            return
        for tensor in network.state_dict().values():
            torch.distributed.broadcast(tensor, src=0)
        if not self.sharded:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(self.device.type, (self.count,))
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if self.bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        # Each block is a root of its own: critics call blocks without the network around them, and what lies outside
        # blocks (first and last layers, embeddings, heads) is small and stays whole.
        for block in _blocks(network):
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


ALONE = Ranks()


def join(device: str | None = None, *, mode: str = "ddp", bf16: bool = False) -> Ranks:
    """Meet the other processes that torchrun started; alone where it did not.

    Errors: `RecipeError` for a mode that is not known, or fewer GPUs than processes here.
    """
    if mode not in MODES:
        raise RecipeError(f"parallel is {mode!r}; it must be one of {', '.join(MODES)}")
    cuda = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Ranks(device=torch.device(device or ("cuda" if cuda else "cpu")))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda and local_rank >= torch.cuda.device_count():
        raise RecipeError(
            f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}; start as many "
            "processes as GPUs, or give --device cpu"
        )
    where = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(where)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    return Ranks(torch.distributed.get_rank(), count, where, mode == "fsdp", bf16)


def leave(ranks: Ranks) -> None:
    if ranks.count > 1 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def save_network(network: nn.Module, file: Path, ranks: Ranks) -> None:
    """The whole weights as safetensors, by the first process; every process must call."""
    from safetensors.torch import save_file, save_model

    if not ranks.sharded:
        if ranks.first:
            save_model(network, str(file))
        ranks.wait()
        return
    state = {name: whole(value).contiguous().cpu() for name, value in network.state_dict().items()}
    if ranks.first:
        save_file(state, file)
    ranks.wait()


def is_shard(tensor: Tensor) -> bool:
    """Whether the tensor is one process's share of a larger one."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """The tensor itself, or the share of it that lies here."""
    found: Tensor = tensor.detach().to_local() if is_shard(tensor) else tensor  # type: ignore[attr-defined]
    return found


def whole(tensor: Tensor) -> Tensor:
    """The tensor from all shares; every process must ask."""
    found: Tensor = tensor.full_tensor() if is_shard(tensor) else tensor  # type: ignore[attr-defined]
    return found


def put(own: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into `own`, or the share of it that lies here."""
    if is_shard(own):
        from torch.distributed.tensor import distribute_tensor

        there: Any = own
        value = distribute_tensor(value.to(own.device), there.device_mesh, there.placements, src_data_rank=None)
    local(own).copy_(local(value))


def _blocks(network: nn.Module) -> list[nn.Module]:
    """Of a network, or of the networks that it holds."""
    names = stages_of(network)
    if names:
        return [network.get_submodule(name) for name in names]
    return [block for child in network.children() for block in _blocks(child)]


def _buckets(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Runs of one type, of `BUCKET` bytes or a little more."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (bucket[0].dtype != tensor.dtype or sum(t.nbytes for t in bucket) >= BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
