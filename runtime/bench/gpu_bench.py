"""`fewstep bench gpu`: few-step networks at full size with random weights on one GPU, and how far from its limits.

One call from embedded text and noise in the host's memory to pixels in the host's memory: every step's network and row
update, then a tiny decoder. Networks are plain torch (`fewstep.runtime.bench.gpu_shapes`), so it needs no other
package. Work is ordered by importance and stops at the time budget; the result file is complete after every case.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.arguments import read_count, read_output
from fewstep.models.files import write_whole

from ..engines.measurement import call_seconds, machine_facts
from ..errors import EngineUnavailable
from .gpu_plan import MODES, PLAN, PRECISIONS, SHAPES, TINY_PLAN, Case, Shape
from .gpu_shapes import TinyDecoder
from .operations import count_operations
from .peak import copy_bandwidth, matrix_peak

STEPS = (1, 2, 4)
REPEATS = 30
GUESS_S = {"eager": 15.0, "graph": 20.0, "compiled": 110.0}
"""What a case of a mode takes at most, until one was measured."""


def bench_gpu(
    plan: Sequence[Case],
    *,
    device: str = "cuda",
    budget_s: float = 540.0,
    repeats: int = REPEATS,
    save: Callable[[dict[str, Any]], None],
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Measure the cases in order until the budget would be passed; `save` gets the report after each.

    A case that breaks (out of memory, a compiler's error) is named in `skipped`, and the next one follows.

    Errors: `EngineUnavailable` where the device is not there.
    """
    _make_current(device)
    begun = clock()
    if device.startswith("cuda"):
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # SANA sums its attention in float32
    precisions = {name: PRECISIONS[name] for name in dict.fromkeys(case.precision for case in plan)}
    peak = {name: matrix_peak(dtype, device=device) for name, dtype in precisions.items()}
    bandwidth = copy_bandwidth(device=device, size_bytes=1 << (30 if device.startswith("cuda") else 26))
    report: dict[str, Any] = {"kind": "gpu", "machine": machine_facts(), "rows": [], "skipped": []}
    report["peak"] = {"flop_per_s": peak, "bytes_per_s": bandwidth}
    networks = cache(partial(_networks, device=device))
    taken_s: dict[tuple[str, str], float] = {}
    for case in plan:
        started = clock()
        expected = taken_s.get((case.shape, case.mode), GUESS_S[case.mode])
        if started - begun + expected > budget_s:
            report["skipped"].append({"what": str(case), "why": f"the budget of {budget_s:g} s"})
            save(report)
            continue
        try:
            made = networks(case.shape, case.precision)
            report["rows"] += _measure(case, made, device, peak[case.precision], bandwidth, repeats)
        except Exception as error:
            report["skipped"].append({"what": str(case), "why": f"{type(error).__name__}: {str(error)[:200]}"})
        taken_s[case.shape, case.mode] = clock() - started
        _release(device)
        save(report)
    return report


def _make_current(device: str) -> None:
    """Streams, captured graphs and the machine's name are those of CUDA's current device."""
    if device == "cpu":
        return
    if not device.startswith("cuda"):
        raise EngineUnavailable(f"device is {device!r}; use cuda, cuda:N or cpu")
    if not torch.cuda.is_available():
        raise EngineUnavailable(f"device is {device!r} and torch sees no CUDA device; try --device cpu --shape tiny")
    try:
        index = torch.device(device).index
        if index is not None:
            torch.cuda.set_device(index)
    except (RuntimeError, ValueError) as error:
        raise EngineUnavailable(f"device is {device!r}: {error}; torch sees {torch.cuda.device_count()}") from error


@dataclass(frozen=True)
class Networks:
    """Of one shape in one precision: operations for a batch of one, bytes of the weights."""

    shape: Shape
    dtype: torch.dtype
    denoiser: nn.Module
    decoder: nn.Module
    operations: tuple[int, int]
    weight_bytes: tuple[int, int]


@dataclass(frozen=True)
class Buffers:
    """What a call works on: the device's tensors that every replay reads and writes, and the host's."""

    x: Tensor
    t: Tensor
    ctx: Tensor
    added: Tensor | None
    noise: Tensor
    picture: Tensor
    host_noise: Tensor
    host_ctx: Tensor
    host_picture: Tensor


def _networks(name: str, precision: str, *, device: str) -> Networks:
    shape, dtype = SHAPES[name], PRECISIONS[precision]
    torch.manual_seed(0)
    with torch.device(device):
        parts = shape.make(), TinyDecoder(shape.latent[0], blocks=shape.decoder_blocks)
    denoiser, decoder = (
        part.eval().requires_grad_(False).to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for part in parts
    )
    b = _buffers(shape, dtype, 1, device)
    with torch.inference_mode():
        operations = (
            count_operations(lambda: denoiser(b.x, b.t, b.ctx, b.added)),
            count_operations(lambda: decoder(b.x)),
        )
    sizes = [sum(p.numel() * p.element_size() for p in part.parameters()) for part in parts]
    return Networks(shape, dtype, denoiser, decoder, operations, (sizes[0], sizes[1]))


def _buffers(shape: Shape, dtype: torch.dtype, batch: int, device: str) -> Buffers:
    pinned = device.startswith("cuda")
    latent, side = (batch, *shape.latent), shape.latent[1] * shape.factor
    noise = torch.randn(latent).to(dtype)
    ctx = torch.randn(batch, *shape.ctx).to(dtype)
    host_picture = torch.empty(batch, side, side, 3, dtype=torch.uint8)
    if pinned:
        noise, ctx, host_picture = noise.pin_memory(), ctx.pin_memory(), host_picture.pin_memory()
    x = torch.empty_like(noise, device=device).contiguous(memory_format=torch.channels_last).copy_(noise)
    added = None
    if shape.added is not None:
        added = torch.randn(batch, *shape.added, device=device).to(dtype)
    return Buffers(
        x=x,
        t=torch.full((batch,), 500.0, device=device),
        ctx=ctx.to(device),
        added=added,
        noise=torch.randn_like(x),
        picture=torch.empty(batch, side, side, 3, dtype=torch.uint8, device=device),
        host_noise=noise,
        host_ctx=ctx,
        host_picture=host_picture,
    )


def _measure(
    case: Case, made: Networks, device: str, peak: float, bandwidth: float, repeats: int
) -> list[dict[str, Any]]:
    """One row per step count."""
    b = _buffers(made.shape, made.dtype, case.batch, device)
    denoiser: Any = made.denoiser
    decoder: Any = made.decoder
    if case.mode == "compiled":
        denoiser, decoder = (torch.compile(part, dynamic=False) for part in (denoiser, decoder))

    def step() -> None:
        """The network, then x <- A x + B F + C z with coefficients of an LCM-like row."""
        out = denoiser(b.x, b.t, b.ctx, b.added)
        b.x.copy_(0.3 * b.x - 0.6 * out + 0.5 * b.noise)

    def decode() -> None:
        pixels = decoder(b.x).mul(127.5).add(127.5).clamp(0, 255).round()
        b.picture.copy_(pixels.permute(0, 2, 3, 1))

    rows = []
    with torch.inference_mode():
        captured = case.mode != "eager" and device.startswith("cuda")
        run_step, run_decode = (_captured(call) if captured else call for call in (step, decode))
        step_s = _median_s(run_step, device, repeats)

        def whole(steps: int) -> None:
            b.x.copy_(b.host_noise, non_blocking=True)
            b.ctx.copy_(b.host_ctx, non_blocking=True)
            for _ in range(steps):
                run_step()
            run_decode()
            b.host_picture.copy_(b.picture, non_blocking=True)

        for steps in STEPS:
            seconds = _median_s(partial(whole, steps), device, repeats)
            floor_s = sum(
                count * max(ops * case.batch / peak, size / bandwidth)
                for count, ops, size in zip((steps, 1), made.operations, made.weight_bytes, strict=True)
            )
            rows.append(
                {
                    **asdict(case),
                    "steps": steps,
                    "p50_ms": seconds * 1e3,
                    "floor_ms": floor_s * 1e3,
                    "over_floor": seconds / floor_s,
                    "images_per_s": case.batch / seconds,
                    "denoiser_ms": step_s * 1e3,
                    "gflop": made.operations[0] * case.batch / 1e9,
                    "fraction_of_peak": made.operations[0] * case.batch / step_s / peak,
                }
            )
    return rows


def _captured(call: Callable[[], None]) -> Callable[[], None]:
    """The call as one CUDA graph, after some that let kernels be chosen and compiled."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    replay: Callable[[], None] = graph.replay
    return replay


def _median_s(call: Callable[[], None], device: str, repeats: int) -> float:
    return statistics.median(call_seconds(call, device, repeats=repeats, warm_up=3))


def _release(device: str) -> None:
    """Between cases: captured graphs and compiled code hold memory."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def table(report: dict[str, Any]) -> str:
    peak = ", ".join(f"{name} {speed / 1e12:.3g} TFLOP/s" for name, speed in report["peak"]["flop_per_s"].items())
    bandwidth = report["peak"]["bytes_per_s"] / 1e12
    lines = [f"measured peak: {peak}, {bandwidth:.3g} TB/s", ""]
    lines.append(f"{'case':<40} {'steps':>5} {'p50 ms':>9} {'floor':>8} {'over':>6} {'img/s':>8} {'of peak':>8}")
    for row in report["rows"]:
        name = str(Case(row["shape"], row["precision"], row["mode"], row["batch"]))
        figures = (
            f"{row['p50_ms']:>9.2f} {row['floor_ms']:>8.2f} {row['over_floor']:>5.1f}x {row['images_per_s']:>8.1f}"
        )
        lines.append(f"{name:<40} {row['steps']:>5} {figures} {row['fraction_of_peak']:>8.0%}")
    return "\n".join([*lines, *(f"left out: {gone['what']}: {gone['why']}" for gone in report["skipped"])])


def command(argv: Sequence[str]) -> int:
    """`fewstep bench gpu`. Exit code 1 where no case could be measured."""
    parser = argparse.ArgumentParser(
        prog="fewstep bench gpu",
        description="Few-step networks at full size with random weights on one GPU, with the floor that its measured "
        "matrix peak and bandwidth set. The result file is complete after every case.",
        epilog="example: fewstep bench gpu --json docs/performance/gpu.json",
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu; default: cuda")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="only this one; tiny tries the code on any machine")
    parser.add_argument("--mode", choices=MODES, help="only this one; default: all")
    parser.add_argument("--budget-s", type=float, default=540.0, help="begin no case beyond this; default: 540")
    parser.add_argument(
        "--repeats", type=read_count, default=REPEATS, help=f"calls measured per case; default: {REPEATS}"
    )
    parser.add_argument("--json", type=read_output, metavar="FILE", help="write the report there after every case")
    args = parser.parse_args(argv)
    plan = TINY_PLAN if args.shape == "tiny" else [case for case in PLAN if args.shape in (None, case.shape)]
    plan = [case for case in plan if args.mode in (None, case.mode)]
    if not plan:
        parser.error(f"no case is of shape {args.shape} and mode {args.mode}")
    said = " ".join(["fewstep bench gpu", *argv])

    def save(report: dict[str, Any]) -> None:
        report["command"] = said
        if args.json is not None:
            write_whole(args.json, (json.dumps(report, indent=1) + "\n").encode())

    report = bench_gpu(plan, device=args.device, budget_s=args.budget_s, repeats=args.repeats, save=save)
    print(table(report))
    return 0 if report["rows"] else 1


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
