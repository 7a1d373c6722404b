"""What takes part in `fewstep bench latency`: prompt to PNG bytes, by our runtime or by a peer, on the same weights."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..sampling.images import encode
from ..sampling.request import GenerateRequest
from ..service.config import DEFAULT_BUDGET_S, RuntimeConfig

if TYPE_CHECKING:
    from fewstep.models.bundle import Bundle

    from ..engine import Engine
    from ..sampling.events import Picture
    from ..service.local import Runtime

STAGES = ("text", "denoiser", "decode", "encode", "overhead")


@dataclass(frozen=True)
class Sample:
    """One prompt to PNG bytes: seconds in all and, where known, by stage; the first picture."""

    total_s: float
    stages_s: Mapping[str, float]
    picture: "Picture"


Contestant = Callable[[str, int, int, int], Sample]
"""(prompt, seed, steps, batch) -> sample."""


def bench_runtime(bundle: "Bundle", engine: "Engine", threads: int | None) -> "Runtime":
    """A runtime over an opened engine that keeps no text embedding from one prompt to the next."""
    from ..service.local import Runtime

    # one place holds just the running prompt; under guidance "" would stay in it
    cached = 0 if bundle.spec.guidance.mode == "cfg" else 1
    config = RuntimeConfig(threads=threads, text_cache=cached, calibration_budget_s=DEFAULT_BUDGET_S)
    return Runtime([bundle], engines={bundle.name: engine}, config=config)


def runtime_contestant(runtime: "Runtime") -> Contestant:
    """Our runtime; overhead is what its stages leave of the whole."""

    def run(prompt: str, seed: int, steps: int, batch: int) -> Sample:
        begun = time.perf_counter()
        result = runtime.generate(GenerateRequest(prompt=prompt, seed=seed, steps=steps, n=batch))
        made = time.perf_counter()
        for picture in result.pictures:
            encode(picture, "png")
        ended = time.perf_counter()
        spent = result.timings
        stages = {"text": spent.text_s, "denoiser": spent.denoise_s, "decode": spent.decode_s, "encode": ended - made}
        stages["overhead"] = max(0.0, ended - begun - sum(stages.values()))
        return Sample(ended - begun, stages, result.pictures[0])

    return run
