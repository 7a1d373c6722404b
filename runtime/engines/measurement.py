"""How times are taken: contestants in turns on the same work, percentiles of what they took, and the machine."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
WARM_UP = 2
PAUSE_S = 0.005
"""Between contestants, for the threads of the last one to fall asleep."""
PACKAGES = (
    "torch",
    "diffusers",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "openvino-genai",
    "tensorrt-rtx",
    "pillow",
)


def take_turns(
    contestants: Mapping[str, Callable[[int], T]], repeats: int, tell: Callable[[str], None], *, warm_up: int = WARM_UP
) -> dict[str, list[T]]:
    """Each contestant once per turn, called with the turn's number (A B C A B C ...); the first turns only warm up."""
    found: dict[str, list[T]] = {name: [] for name in contestants}
    for turn in range(warm_up + repeats):
        for name, run in contestants.items():
            tell(name)
            time.sleep(PAUSE_S)
            outcome = run(turn)
            if turn >= warm_up:
                found[name].append(outcome)
    return found


def timed(call: Callable[[], object]) -> Callable[[int], float]:
    """What takes turns to say how many seconds `call` took."""

    def run(turn: int) -> float:
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun

    return run


def call_seconds(call: Callable[[], object], device: str, *, repeats: int, warm_up: int = 1) -> list[float]:
    """Seconds of each of `repeats` calls, until the device is done with it; the first ones only warm up."""
    wait = device_wait(device)
    for _ in range(warm_up):
        call()
    taken = []
    for _ in range(repeats):
        wait()
        begun = time.perf_counter()
        call()
        wait()
        taken.append(time.perf_counter() - begun)
    return taken


def device_wait(device: str) -> Callable[[], object]:
    """What returns once the device has done all that it was given; a CPU has when a call returns."""
    if not device.startswith("cuda"):
        return lambda: None
    import torch

    return partial(torch.cuda.synchronize, device)


def percentiles(seconds: Sequence[float], batch: int) -> dict[str, float]:
    """Nearest-rank percentiles in ms, and pictures per second at the median."""
    ranked = sorted(seconds)

    def at(percent: int) -> float:
        return round(ranked[max(0, -(-len(ranked) * percent // 100) - 1)] * 1e3, 3)

    median = statistics.median(ranked)
    return {
        "p50_ms": round(median * 1e3, 3),
        "p95_ms": at(95),
        "p99_ms": at(99),
        "images_per_s": round(batch / median, 2),
    }


def machine_facts() -> dict[str, Any]:
    """What a reader needs to place the figures."""
    import torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if torch.cuda.is_available() else {}
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        **gpu,
        "system": platform.platform(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        **versions,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()
