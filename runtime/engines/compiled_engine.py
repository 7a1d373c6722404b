"""A bundle's own networks, faster: rounded to bfloat16, compiled by torch, captured as CUDA graphs, or several of it.

What must be made for a shape (a compilation, a capture) is made when the engine is opened, for every batch size that
it offers and every picture size of the spec. A shape that was not prepared runs the network as it is: a request never
waits for a compiler.
"""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from shutil import which
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.bundle import Bundle

from ..engine import DECODER, DENOISER, ENCODER, ROLES, TEXT
from ..errors import EngineFailed, EngineUnavailable
from ..sampling.served import Served
from ..sampling.text import Prompts
from .calibrate import role_calls
from .torch_engine import TorchEngine

ROUNDED = tuple(role for role in ROLES if role != TEXT)
"""Roles that bfloat16 is for: roles share components, so all or none. But text encoders are nobody else's, a text is
encoded once and cached: its error would stay, its time is nothing."""
BATCH_SIZES = (1, 4)
"""Prepared unless told otherwise: a compilation of a U-Net takes up to a minute for each."""
KEPT_EXACT = ("size_ids",)
"""Feeds that stay float32 beside those of one number per row (times, scales): numbers whose sine and cosine are taken.
Rounded, 999 would be 1000."""


CAPTURE_WARM_UP = 3
"""Runs before a capture, as torch's manual advises."""
Feeds = tuple[Tensor | None, ...]
Call = Callable[..., Any]
Make = Callable[[Call, Feeds], Call]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to run the networks. Weights of convolutions lie channels last in all of them."""

    bf16: bool = False
    compiled: bool = False
    captured: bool = False

    @property
    def prepared(self) -> tuple[str, ...]:
        """Roles prepared ahead. Compiling takes a minute per shape, so what steers is compiled only on request."""
        if self.compiled:
            return (DENOISER, DECODER)
        return tuple(role for role in ROUNDED if role != ENCODER) if self.captured else ()


VARIANTS = {
    "torch-bf16": Variant(bf16=True),
    "torch-compile": Variant(compiled=True),
    "torch-compile-bf16": Variant(compiled=True, bf16=True),
    "torch-cudagraphs": Variant(captured=True),
    "torch-cudagraphs-bf16": Variant(captured=True, bf16=True),
    "torch-compile-cudagraphs": Variant(compiled=True, captured=True),
    "torch-compile-cudagraphs-bf16": Variant(compiled=True, captured=True, bf16=True),
}
"""Engine kind -> variant."""


def open_variant(
    bundle: Bundle,
    *,
    kind: str,
    threads: int | None = None,
    device: str | None = None,
    batch_sizes: Sequence[int] | None = None,
    roles: Sequence[str] | None = None,
    inductor: Mapping[str, Any] | None = None,
) -> TorchEngine:
    """An engine of `VARIANTS`, with all its shapes prepared.

    device: None is CUDA where the variant captures or torch sees a device, else the CPU. batch_sizes: what calls are
    padded to; None is `BATCH_SIZES`, and any for plain bfloat16. roles: what is prepared ahead; None is
    `Variant.prepared`. inductor: settings of torch's compiler, as `torch.compile(options=...)` takes them.

    Errors: `EngineUnavailable` where the device or a C++ compiler is missing, a setting is not for this variant, or a
    network cannot be prepared.
    """
    variant = VARIANTS[kind]
    place = device or ("cuda" if variant.captured or torch.cuda.is_available() else "cpu")
    if variant.captured and not place.startswith("cuda"):
        raise EngineUnavailable(f"device is {place!r}; the engine {kind!r} captures CUDA graphs: use 'cuda'")
    given = {"batch_sizes": batch_sizes, "roles": roles, "inductor": inductor}
    taken = ("batch_sizes", "roles", "inductor") if variant.compiled else ("batch_sizes", "roles")
    for name, value in given.items():
        if value is not None and name not in (taken if variant.prepared else ()):
            raise EngineUnavailable(f"{name} was given; the engine {kind!r} has no use for it: leave it out")
    if variant.compiled and place == "cpu" and cpp_compiler() is None:
        raise EngineUnavailable(
            f"engine {kind!r} needs a C++ compiler and finds neither $CXX, g++ nor clang++; install g++, or use 'torch'"
        )
    ahead = variant.prepared if roles is None else tuple(roles)
    buckets: dict[str, Buckets] = {}

    def prepare(role: str, network: Any) -> Callable[..., Any]:
        network.to(memory_format=torch.channels_last)
        if variant.bf16 and role in ROUNDED:
            network = Rounded(network)
        if role not in ahead:
            return network  # type: ignore[no-any-return]
        buckets[role] = Buckets(network, _maker(variant, inductor or {}))
        return buckets[role]

    sizes = tuple(sorted(set(batch_sizes or BATCH_SIZES))) if ahead else ()
    engine = TorchEngine(bundle, threads=threads, device=place, name=kind, prepare=prepare, batch_sizes=sizes)
    try:
        _prepare_all(bundle, engine, buckets)
    except EngineFailed as error:
        engine.close()
        raise EngineUnavailable(
            f"{kind} cannot be prepared for {bundle.name} ({error}); use the engine 'torch'"
        ) from error
    return engine


class Rounded(nn.Module):
    """A network whose weights and arithmetic are bfloat16, between float32 inputs and outputs."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network.to(torch.bfloat16)
        self.inputs, self.outputs = network.inputs, network.outputs

    def forward(self, *feeds: Tensor | None) -> tuple[Tensor, ...] | Tensor:
        out = self.network(*(_rounded(name, feed) for name, feed in zip(self.inputs, feeds, strict=True)))
        return tuple(part.float() for part in out) if isinstance(out, tuple) else out.float()


def _rounded(name: str, feed: Tensor | None) -> Tensor | None:
    if feed is None or not feed.is_floating_point() or feed.ndim == 1 or name in KEPT_EXACT:
        return feed
    return feed.to(torch.bfloat16)


class Buckets:
    """A network with something faster in its place for the shapes it was prepared for.

    make: (network, example feeds) -> what runs the network for feeds of just these shapes.
    """

    def __init__(self, network: Call, make: Make) -> None:
        self._network = network
        self._make = make
        self._ready: dict[Any, Call] = {}
        self.preparing = False

    def __call__(self, *feeds: Tensor | None) -> Any:
        given = tuple(map(_plain, feeds))
        shapes = tuple((feed.shape, feed.dtype) if feed is not None else None for feed in given)
        if self.preparing and shapes not in self._ready:
            self._ready[shapes] = self._make(self._network, given)
        return self._ready.get(shapes, self._network)(*given)


def compile_for(network: Call, feeds: Feeds, inductor: Mapping[str, Any]) -> Call:
    """`network` compiled for the shapes of `feeds`. Should torch ever want to compile again, it runs uncompiled."""
    compiled = torch.compile(network, dynamic=False, fullgraph=True, options=dict(inductor))
    with torch._dynamo.config.patch(recompile_limit=1024), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on the compiler's own workings
        for _ in range(2):
            compiled(*feeds)

    def run(*given: Tensor | None) -> Any:
        with torch.compiler.set_stance("eager_on_recompile"):
            return compiled(*given)

    return run


def capture_for(network: Call, feeds: Feeds, *, cuda: Any = torch.cuda, pool: Any = None) -> Call:
    """`network` on copies of `feeds` as a CUDA graph. Its outputs are the graph's own: valid until its next call.

    pool: memory that graphs share of which only one's outputs are in use at a time (`torch.cuda.graph_pool_handle`).
    """
    held = tuple(feed if feed is None else feed.clone() for feed in feeds)
    side = cuda.Stream()
    side.wait_stream(cuda.current_stream())
    with cuda.stream(side):  # lazy set-up of libraries must not fall into the capture, nor on the stream in use
        for _ in range(CAPTURE_WARM_UP):
            network(*held)
    cuda.current_stream().wait_stream(side)
    graph = cuda.CUDAGraph()
    with cuda.graph(graph, pool=pool):
        outputs = network(*held)

    def run(*given: Tensor | None) -> Any:
        for kept, feed in zip(held, given, strict=True):
            if kept is not None and feed is not None:
                kept.copy_(feed)
        graph.replay()
        return outputs

    return run


def cpp_compiler() -> str | None:
    """The C++ compiler that torch would use on this machine."""
    return next((found for name in (os.environ.get("CXX"), "g++", "clang++") if name and (found := which(name))), None)


def _maker(variant: Variant, inductor: Mapping[str, Any]) -> Make:
    """What prepares one role: its graphs share memory, for an output is dead at the role's next call."""
    pool = torch.cuda.graph_pool_handle() if variant.captured else None

    def make(network: Call, feeds: Feeds) -> Call:
        call = compile_for(network, feeds, inductor) if variant.compiled else network
        return capture_for(call, feeds, pool=pool) if variant.captured else call

    return make


@torch.inference_mode()
def _prepare_all(bundle: Bundle, engine: TorchEngine, buckets: Mapping[str, Buckets]) -> None:
    """Run every call of serving in every batch size and picture size, while the buckets prepare what they meet."""
    if not buckets:
        return
    for bucket in buckets.values():
        bucket.preparing = True
    model = Served(bundle.name, bundle.spec, engine, Prompts(bundle, capacity=1))
    for size in bundle.spec.sizes:
        for role, call in role_calls(model, size).items():
            for batch in engine.capabilities.batch_sizes if role in buckets else ():
                call(batch)
    for bucket in buckets.values():
        bucket.preparing = False


def _plain(feed: Tensor | None) -> Tensor | None:
    """Compiled code is bound to the layout of its inputs and to whether they were made under inference mode."""
    if feed is None:
        return None
    whole = feed.contiguous()
    return whole if whole.is_inference() else whole.clone()
