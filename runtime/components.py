"""Each network alone: what one call takes per engine and batch size, its operations, and what of the peak that is."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .engine import CONTROLNET, Engine
from .measurement import percentiles, take_turns, timed
from .operations import count_operations
from .peak import matrix_peak
from .recording import RecordingEngine
from .request import Control, GenerateRequest
from .step import run_batch

if TYPE_CHECKING:
    from fewstep.models.bundle import Bundle

Feeds = Mapping[str, Tensor]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Those whose peak this machine is asked for; fp16 and int8 have no fast matrix product in torch on a CPU."""


def precision_of(kind: str) -> str:
    """The precision that ends an engine's kind (`openvino-bf16`); "fp32" for a kind that names none."""
    last = kind.rpartition("-")[2]
    return last if last in ("bf16", "fp16", "fp8", "int8") else "fp32"


class Peaks:
    """GFLOP/s of a square matrix product in fp32 and every other precision that engines of these kinds compute in.

    Taken again and again through a run, and the best kept, since a neighbour on the machine slows a single one.
    """

    def __init__(self, kinds: Sequence[str]) -> None:
        wanted = {"fp32", *map(precision_of, kinds)} & set(PRECISIONS)
        self.best = dict.fromkeys(sorted(wanted, reverse=True), 0.0)

    def sample(self) -> None:
        for name, best in self.best.items():
            self.best[name] = max(best, round(matrix_peak(PRECISIONS[name], repeats=2) / 1e9, 1))


def record_feeds(engine: Engine, bundle: "Bundle") -> dict[str, Feeds]:
    """What each role of `engine` is fed by a real request of one picture, ControlNet included where there is one."""
    from .loop import run_request

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
            calls = {kind: timed(partial(run_batch, engine, role, many)) for kind, engine in able.items()}
            for kind, seconds in take_turns(calls, repeats, lambda kind, r=role: tell(f"{r}, {kind}")).items():  # type: ignore[misc]
                row: dict[str, Any] = {"engine": kind, "role": role, "batch": batch, **percentiles(seconds, batch)}
                speed = operations[role] * batch / row["p50_ms"] / 1e6
                row |= {"gflop": round(operations[role] * batch / 1e9, 6), "gflop_per_s": round(speed, 1)}
                rows.append(row)
    peaks.sample()
    for row in rows:
        peak = peaks.best.get(precision_of(row["engine"]))
        row["fraction_of_peak"] = None if peak is None else round(row["gflop_per_s"] / peak, 3)
    return rows
