"""One ONNX graph to one serialized TensorRT engine: a strongly typed network, and a profile per batch and size bucket.

Precision is a matter of the graph: TensorRT computes in the types that it finds there. TensorRT reports by its logger
and returns None or False; here every such answer becomes an `EngineUnavailable` with what it said.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.models.files import write_whole
from fewstep.runtime.engines.manifest import Graph
from fewstep.runtime.engines.tensorrt_engine import TORCH_DTYPES
from fewstep.runtime.engines.tensorrt_flavour import TensorRT, said
from fewstep.runtime.errors import EngineUnavailable

Range = tuple[int, int, int]
"""The least, the usual (which it is tuned for) and the most."""
BATCHES: tuple[Range, ...] = ((1, 1, 1), (2, 4, 4), (5, 8, 8))
Profile = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""Input -> its least, usual and most shape."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """refit: weights can be changed in the built engine (needs a GPU at the build). tf32: matrix products of float32
    may be rounded to 10 bits of mantissa. level: effort of the builder, 0 (quickest build) to 5.
    """

    refit: bool = False
    tf32: bool = False
    level: int = 3


def profiles_of(graph: Graph, batches: Sequence[Range], lengths: Sequence[Mapping[str, int]]) -> tuple[Profile, ...]:
    """A profile for each batch range at each size; sizes that give the same shapes share one.

    lengths: for each size the length of every free axis but the batch, by the names in the graph's ports.

    Errors: `EngineUnavailable` where a port's axis is not a product of these.
    """
    found: list[Profile] = []
    for free in lengths:
        for batch in batches:
            at = [{**free, "batch": size} for size in batch]
            low, usual, high = ({p.name: shape_of(p.shape, values) for p in graph.inputs} for values in at)
            profile = {name: (low[name], usual[name], high[name]) for name in low}
            if profile not in found:
                found.append(profile)
    return tuple(found)


def shape_of(shape: Sequence[int | str], lengths: Mapping[str, int]) -> tuple[int, ...]:
    """A port's shape with its free axes filled in; an axis may be a product such as "2*rows"."""
    return tuple(entry if isinstance(entry, int) else _product(entry, lengths) for entry in shape)


def _product(axis: str, lengths: Mapping[str, int]) -> int:
    found = 1
    for factor in axis.split("*"):
        name = factor.strip()
        if not name.isdigit() and name not in lengths:
            raise EngineUnavailable(f"the graph's axis {axis!r} follows from none of {', '.join(lengths)}")
        found *= int(name) if name.isdigit() else lengths[name]
    return found


def build_engine(
    tensorrt: TensorRT,
    role: str,
    file: Path,
    graph: Graph,
    profiles: Sequence[Profile],
    settings: Settings,
    *,
    timings: Path | None = None,
) -> Any:
    """The serialized engine of one graph as a buffer of bytes; they differ from build to build.

    timings: where measured kernels are kept for the next build, for a flavour that measures them.

    Errors: `EngineUnavailable` naming the role, the profile or node, and TensorRT's own message.
    """
    trt, errors = tensorrt.module, []  # type: Any, list[str]
    builder = trt.Builder(tensorrt.logger(errors))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, tensorrt.logger(errors))  # it holds on to the network
    if not parser.parse_from_file(str(file)):
        found = [parser.get_error(k) for k in range(parser.num_errors)]
        reasons = [f"{e.node_operator()} node {e.node_name()!r}: {e.desc()}" for e in found] or [said(errors)]
        raise EngineUnavailable(f"{tensorrt} cannot parse the graph of {role!r}: {'; '.join(reasons)}")
    _check_inputs(tensorrt, role, network, graph)
    config = builder.create_builder_config()
    config.builder_optimization_level = settings.level
    for flag, wanted in ((trt.BuilderFlag.REFIT, settings.refit), (trt.BuilderFlag.TF32, settings.tf32)):
        (config.set_flag if wanted else config.clear_flag)(flag)
    for number, shapes in enumerate(profiles):
        _add_profile(tensorrt, role, builder, config, number, shapes, errors)
    if tensorrt.flavour.times_kernels and timings is not None:
        known = timings.read_bytes() if timings.is_file() else b""
        cache = config.create_timing_cache(known)
        if not config.set_timing_cache(cache, False):  # of another device or version: begin anew
            config.set_timing_cache(config.create_timing_cache(b""), False)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise EngineUnavailable(
            f"{tensorrt} cannot build {role!r} with {len(profiles)} profiles and {settings}: {said(errors)}"
        )
    if tensorrt.flavour.times_kernels and timings is not None:
        write_whole(timings, config.get_timing_cache().serialize())
    return engine


def _add_profile(
    tensorrt: TensorRT, role: str, builder: Any, config: Any, number: int, shapes: Profile, errors: list[str]
) -> None:
    profile = builder.create_optimization_profile()
    try:
        for name, (low, usual, high) in shapes.items():
            profile.set_shape(name, low, usual, high)
        accepted = config.add_optimization_profile(profile) >= 0
    except (ValueError, RuntimeError) as error:
        accepted, errors[:] = False, [*errors, str(error)]
    if not accepted:
        raise EngineUnavailable(
            f"{tensorrt} refuses profile {number} of {role!r}, {dict(shapes)}: {said(errors)}; give --batches as "
            "least-usual-most, such as 1-1-1,2-4-4,5-8-8"
        )


def _check_inputs(tensorrt: TensorRT, role: str, network: Any, graph: Graph) -> None:
    """Whether TensorRT read the graph's inputs and outputs as they were exported."""
    tensors = [network.get_input(k) for k in range(network.num_inputs)]
    read = [(t.name, TORCH_DTYPES.get(t.dtype.name, t.dtype.name), tuple(t.shape)) for t in tensors]
    wanted = [(p.name, p.dtype, tuple(n if isinstance(n, int) else -1 for n in p.shape)) for p in graph.inputs]
    outputs = [network.get_output(k).name for k in range(network.num_outputs)]
    if read != wanted or outputs != [p.name for p in graph.outputs]:
        raise EngineUnavailable(
            f"{tensorrt} reads {role!r} as {read} to {outputs}; it was exported as {wanted} to "
            f"{[p.name for p in graph.outputs]}: export it again with `--engine onnx`"
        )
