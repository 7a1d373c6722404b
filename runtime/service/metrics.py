"""Counters and durations as values. An exporter (the server's Prometheus page) reads a `Metrics` and formats it."""

import bisect
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ..schedule.jobs import DENOISE, Work

STAGES = ("text", "encode", "denoise", "decode")
MIXES = ("request", "step", "steering")
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ERRORS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)
BATCHES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


@dataclass(frozen=True)
class Histogram:
    """`counts[i]` values lay in (bounds[i-1], bounds[i]]; the last count is above every bound. `total` is their sum."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    @property
    def count(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True)
class Metrics:
    """One moment of a runtime. Counters rise from its start.

    accepted = sum(failed) + finished + live. rejected counts refusals at `submit` by reason ("queue", "deadline").
    failed is keyed by the error's class name. stage_s, batch_size and requests_per_call are keyed by `STAGES`: seconds
    per engine call; prompts, network evaluations or pictures per call; and the requests that shared it. mixed counts
    denoiser calls whose rows differ in what `MIXES` names: the request, the step, whether a picture steers them.
    forecast_error: |predicted / actual - 1| of the time that finished requests took. scored, refined: pictures that the
    scorer saw, and those of them drawn again. load_s: seconds per model loaded, the first time or again; put_out: how
    often one left memory for another; in_memory: which are there now, and memory_bytes what they count as.
    """

    accepted: int
    finished: int
    failed: Mapping[str, int]
    rejected: Mapping[str, int]
    live: int
    pictures: int
    request_s: Histogram
    queue_s: Histogram
    stage_s: Mapping[str, Histogram]
    batch_size: Mapping[str, Histogram]
    text_cache_hits: int
    text_cache_misses: int
    requests_per_call: Mapping[str, Histogram]
    mixed: Mapping[str, int]
    forecast_error: Histogram
    scored: int
    refined: int
    load_s: Histogram
    put_out: int
    in_memory: Mapping[str, bool]
    memory_bytes: int


class Tally:
    """A histogram being filled."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def value(self) -> Histogram:
        return Histogram(self.bounds, tuple(self.counts), self.total)


class Recorder:
    """Fills the counters; the runtime calls it under its own lock."""

    def __init__(self) -> None:
        self.accepted = 0
        self.finished = 0
        self.pictures = 0
        self.failed: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self.request_s = Tally(SECONDS)
        self.queue_s = Tally(SECONDS)
        self.stage_s = {stage: Tally(SECONDS) for stage in STAGES}
        self.batch_size = {stage: Tally(BATCHES) for stage in STAGES}
        self.requests_per_call = {stage: Tally(BATCHES) for stage in STAGES}
        self.mixed: Counter[str] = Counter(dict.fromkeys(MIXES, 0))
        self.forecast_error = Tally(ERRORS)
        self.scored = 0
        self.refined = 0
        self.load_s = Tally(SECONDS)
        self.put_out = 0

    def call(self, work: Work, size: int, seconds: float, requests: int) -> None:
        """An engine call did `size` of its kind's work for so many requests."""
        stage = work.kind
        self.stage_s[stage].add(seconds)
        self.batch_size[stage].add(size)
        self.requests_per_call[stage].add(requests)
        if stage == DENOISE and len(work.items) > 1:
            self.mixed["request"] += requests > 1
            self.mixed["step"] += len({item.step for item in work.items}) > 1
            self.mixed["steering"] += work.priced != work.role

    def value(self, *, live: int, hits: int, misses: int, in_memory: Mapping[str, bool], memory_bytes: int) -> Metrics:
        return Metrics(
            accepted=self.accepted,
            finished=self.finished,
            failed=dict(self.failed),
            rejected=dict(self.rejected),
            live=live,
            pictures=self.pictures,
            request_s=self.request_s.value(),
            queue_s=self.queue_s.value(),
            stage_s={stage: tally.value() for stage, tally in self.stage_s.items()},
            batch_size={stage: tally.value() for stage, tally in self.batch_size.items()},
            text_cache_hits=hits,
            text_cache_misses=misses,
            requests_per_call={stage: tally.value() for stage, tally in self.requests_per_call.items()},
            mixed=dict(self.mixed),
            forecast_error=self.forecast_error.value(),
            scored=self.scored,
            refined=self.refined,
            load_s=self.load_s.value(),
            put_out=self.put_out,
            in_memory=in_memory,
            memory_bytes=memory_bytes,
        )
