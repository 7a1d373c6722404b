"""An engine of plain arithmetic: no weights, the same answer everywhere, and told when to break. For anybody's tests.

engine = FakeEngine(spec, faults={("denoiser", 2): Fault("nan", rows=(0,))})
runtime = Runtime([fake_bundle("fake")], engines={"fake": engine})
"""

import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.models.bundle import Bundle
from fewstep.models.paths import VP
from fewstep.models.spec import Boundary, Guidance, Latent, SamplerSpec

from ..engine import CONTROLNET, DECODER, DENOISER, DENOISER_CONTROL, ENCODER, TEXT, Capabilities
from ..errors import EngineFailed

WIDTH = 8
TOKENS = 32
RESIDUALS = 2


@dataclass(frozen=True)
class Fault:
    """What goes wrong in one call. kind: "fail" raises, "nan" spoils `rows` (all if empty), "slow" sleeps `delay_s`."""

    kind: str
    rows: tuple[int, ...] = ()
    delay_s: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("fail", "nan", "slow"):
            raise ValueError(f"kind is {self.kind!r}; use 'fail', 'nan' or 'slow'")


@dataclass(frozen=True)
class Call:
    """One recorded call: its role, its number among the calls of that role (from 0), its batch and its times."""

    role: str
    number: int
    batch: int
    t: tuple[float, ...] = ()


class FakeEngine:
    """Deterministic, row-independent arithmetic behind the engine protocol.

    faults: (role, number of the call among that role's) -> what happens in it. delay_s: sleep of every call, or a
    function of (role, batch). before: called ahead of each call, with no lock held; it may block or raise. `calls`
    keeps what was asked.
    """

    def __init__(
        self,
        spec: SamplerSpec | None = None,
        *,
        control: bool = True,
        edit: bool = True,
        takes_w: bool | None = None,
        takes_s: bool | None = None,
        max_batch: int = 8,
        batch_sizes: tuple[int, ...] = (),
        delay_s: float | Callable[[str, int], float] = 0.0,
        faults: Mapping[tuple[str, int], Fault] | None = None,
        before: Callable[[Call], None] | None = None,
    ) -> None:
        self.spec = spec or fake_spec()
        roles = {TEXT, DENOISER, DECODER} | ({ENCODER} if edit else set())
        if control:
            roles |= {CONTROLNET, DENOISER_CONTROL}
        self.name = "fake"
        self.capabilities = Capabilities(
            roles=frozenset(roles),
            max_batch=max_batch,
            batch_sizes=batch_sizes,
            takes_w=self.spec.guidance.mode == "embedded" if takes_w is None else takes_w,
            takes_s=self.spec.second_time if takes_s is None else takes_s,
        )
        self.calls: list[Call] = []
        self.closed = False
        self._delay_s = delay_s
        self._faults = dict(faults or {})
        self._before = before
        self._counts: Counter[str] = Counter()
        self._running = threading.Lock()

    def run(self, role: str, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        if not self._running.acquire(blocking=False):
            raise AssertionError("an engine is called from one thread at a time")
        try:
            return self._run(role, feeds)
        finally:
            self._running.release()

    def _run(self, role: str, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        if self.closed or role not in self.capabilities.roles:
            raise EngineFailed(f"engine fake is closed or cannot run {role!r}")
        batch = next(iter(feeds.values())).shape[0]
        times = tuple(feeds["t"].tolist()) if "t" in feeds else ()
        call = Call(role, self._counts[role], batch, times)
        self._counts[role] += 1
        self.calls.append(call)
        if self._before is not None:
            self._before(call)
        if batch > self.capabilities.max_batch:
            raise EngineFailed(f"engine fake was given {batch} rows; it takes {self.capabilities.max_batch}")
        delay = self._delay_s(role, batch) if callable(self._delay_s) else self._delay_s
        fault = self._faults.get((role, call.number))
        if fault is not None and fault.kind == "slow":
            delay += fault.delay_s
        if delay > 0:
            time.sleep(delay)
        if fault is not None and fault.kind == "fail":
            raise EngineFailed(f"engine fake was told to fail call {call.number} of {role!r}")
        out = self._answer(role, feeds)
        if fault is not None and fault.kind == "nan":
            out[0][list(fault.rows) if fault.rows else slice(None)] = float("nan")
        return out

    def _answer(self, role: str, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        if role == TEXT:
            phase = feeds["ids"].float()[:, :, None] * torch.arange(1, WIDTH + 1)
            return (torch.sin(phase),)
        if role == DECODER:
            return (_enlarge(torch.tanh(feeds["latent"]), self.spec.latent.factor),)
        if role == ENCODER:
            factor = self.spec.latent.factor
            small = torch.nn.functional.avg_pool2d(feeds["picture"], factor).mean(dim=1, keepdim=True)
            return (small.expand(-1, self.spec.latent.channels, -1, -1) * self.spec.latent.scale,)
        x, t = feeds["x"], feeds["t"][:, None, None, None]
        words = feeds["ctx"].mean(dim=(1, 2))[:, None, None, None]
        if role == CONTROLNET:
            strength = (feeds["edge"].mean(dim=(1, 2, 3)) * feeds["scale"])[:, None, None, None]
            return tuple((k + 1) * strength * torch.cos(x) for k in range(RESIDUALS))
        f = 0.5 * torch.sin(x) + 0.3 * words + 1e-4 * t
        if self.capabilities.takes_w:
            f = f + 0.01 * feeds["w"][:, None, None, None]
        if self.capabilities.takes_s:
            f = f - 1e-4 * feeds["s"][:, None, None, None]
        if role == DENOISER_CONTROL:
            f = f + 0.1 * torch.stack([feeds[f"residual_{k}"] for k in range(RESIDUALS)]).sum(dim=0)
        return (f,)

    def close(self) -> None:
        self.closed = True


class FakeTokenizer:
    """Words to numbers by checksum; speaks as much of a tokenizer's language as the runtime asks for."""

    model_max_length = TOKENS
    pad_token_id = 0

    def __call__(self, text: str, *, truncation: bool, max_length: int | None) -> Mapping[str, list[int]]:
        ids = [1, *(2 + zlib.crc32(word.encode()) % 997 for word in text.split()), 0]
        return {"input_ids": ids[:max_length]}

    def get_vocab(self) -> dict[str, int]:
        return {}


def fake_spec(**changes: Any) -> SamplerSpec:
    """A 4-step LCM student of 64x64 pictures, 4-channel 8x8 latents; `changes` replace fields."""
    grids = {1: (999.0,), 2: (999.0, 499.0), 4: (999.0, 759.0, 499.0, 259.0)}
    grids[8] = (999.0, 879.0, 759.0, 639.0, 499.0, 379.0, 259.0, 139.0)
    settings: dict[str, Any] = {
        "prediction": "v",
        "path": VP(),
        "sampler": "lcm",
        "grids": grids,
        "stochastic": True,
        "guidance": Guidance(mode="embedded", default=3.0, range=(1.0, 8.0)),
        "boundary": Boundary(),
        "latent": Latent(channels=4, factor=8, scale=1.0),
        "sizes": ((64, 64),),
        "recipe": "none",
    }
    return SamplerSpec(**{**settings, **changes})


def fake_bundle(name: str = "fake", spec: SamplerSpec | None = None) -> Bundle:
    """A bundle with a spec, a tokenizer and no folder behind it; its engine goes to `Runtime(engines={name: ...})`."""
    bundle = Bundle(Path("fake"), name, spec or fake_spec())
    bundle.tokenizer = FakeTokenizer()  # what `Bundle.tokenizers` opens first
    return bundle


def _enlarge(latent: Tensor, factor: int) -> Tensor:
    """Latent channels as RGB, each value a square of pixels."""
    rgb = latent.repeat(1, 3, 1, 1)[:, :3]
    return rgb.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
