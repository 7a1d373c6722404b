"""Each network alone: what one call takes per engine and batch size, its operations, and what of the peak that is."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..engine import CONTROLNET, Engine
from ..engines.measurement import device_wait, percentiles, take_turns, timed
from ..engines.recording import RecordingEngine
from ..sampling.request import Control, GenerateRequest
from ..sampling.step import run_batch
from .operations import count_operations
from .peak import matrix_peak

if TYPE_CHECKING:
    from fewstep.models.bundle import Bundle

Feeds = Mapping[str, Tensor]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Those whose peak a device is asked for; int8 has no matrix product in torch, and fp16 no fast one on a CPU."""


def precision_of(kind: str) -> str:
    """The precision that ends an engine's kind (`openvino-bf16`); "fp32" for a kind that names none."""
    last = kind.rpartition("-")[2]
    return last if last in ("bf16", "fp16", "fp8", "int8") else "fp32"


class Peaks:
    """GFLOP/s of a square matrix product: on the CPU in fp32, and where and in what precision some engines compute.

    Taken again and again through a run, and the best kept, since a neighbour on the machine slows a single one. `best`
    has it by precision, "fp16 on cuda:0" where the device is not the CPU.
    """

    def __init__(self, devices: Mapping[str, str]) -> None:
        """devices: each engine's kind -> where it computes."""
        asked = {("fp32", "cpu"), *((precision_of(kind), device) for kind, device in devices.items())} - {
            ("fp16", "cpu")
        }
        self._products = {
            _peak_name(name, device): (dtype, device)
            for name, dtype in PRECISIONS.items()
            for device in sorted(device for precision, device in asked if precision == name)
        }
        self.best = dict.fromkeys(self._products, 0.0)

    def sample(self) -> None:
        for name, (dtype, device) in self._products.items():
            self.best[name] = max(self.best[name], round(matrix_peak(dtype, device=device, repeats=2) / 1e9, 1))

    def of(self, kind: str, device: str) -> float | None:
        """The peak that an engine's speed is a fraction of."""
        return self.best.get(_peak_name(precision_of(kind), device))


def _peak_name(precision: str, device: str) -> str:
    return precision if device == "cpu" else f"{precision} on {device}"


def record_feeds(engine: Engine, bundle: "Bundle") -> dict[str, Feeds]:
    """What each role of `engine` is fed by a real request of one picture, ControlNet included where there is one."""
    from ..sampling.loop import run_request

    recorder = RecordingEngine(engine, keep=1)
    run_request(recorder, bundle, GenerateRequest(prompt="a red circle"))
    if CONTROLNET in engine.capabilities.roles:
        width, height = bundle.spec.sizes[0]
        edge = np.zeros((height, width, 3), np.uint8)
        kind = next(iter(bundle.spec.control_kinds), None)
        run_request(recorder, bundle, GenerateRequest(prompt="a red circle", control=Control(edge=edge, kind=kind)))
    return {role: rows[-1] for role, rows in recorder.rows.items()}


def operations_per_role(engine: Engine, feeds: Mapping[str, Feeds]) -> dict[str, int]:
    """Operations of one picture's call of each role. `engine` is torch's eager one, which the counter can see into."""
    return {role: count_operations(lambda r=role, f=fed: engine.run(r, f)) for role, fed in feeds.items()}  # type: ignore[misc]


def component_rows(
    engines: Mapping[str, Engine],
    feeds: Mapping[str, Feeds],
    operations: Mapping[str, int],
    peaks: Peaks,
    *,
    batches: Sequence[int],
    repeats: int,
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """One row per role, batch size and engine that has the role; engines take turns on the same feeds."""
    rows: list[dict[str, Any]] = []
    for role, fed in feeds.items():
        able = {kind: engine for kind, engine in engines.items() if role in engine.capabilities.roles}
        for batch in batches:
            peaks.sample()
            many = {name: value.repeat(batch, *[1] * (value.ndim - 1)) for name, value in fed.items()}
            calls = {kind: timed(_until_done(engine, role, many)) for kind, engine in able.items()}
            for kind, seconds in take_turns(calls, repeats, lambda kind, r=role: tell(f"{r}, {kind}")).items():  # type: ignore[misc]
                row: dict[str, Any] = {"engine": kind, "role": role, "batch": batch, **percentiles(seconds, batch)}
                speed = operations[role] * batch / row["p50_ms"] / 1e6
                row |= {"gflop": round(operations[role] * batch / 1e9, 6), "gflop_per_s": round(speed, 1)}
                rows.append(row)
    peaks.sample()
    for row in rows:
        peak = peaks.of(row["engine"], engines[row["engine"]].capabilities.device)
        row["fraction_of_peak"] = None if peak is None else round(row["gflop_per_s"] / peak, 3)
    return rows


def _until_done(engine: Engine, role: str, feeds: Feeds) -> Callable[[], None]:
    """One call on feeds that lie on the engine's device, and the wait for it."""
    device = engine.capabilities.device
    near, wait = {name: value.to(device) for name, value in feeds.items()}, device_wait(device)

    def call() -> None:
        run_batch(engine, role, near)
        wait()

    return call
