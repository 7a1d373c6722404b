"""The runtime's counters and the server's own, as Prometheus reads them. One registry per app, nothing global."""

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from fewstep.runtime.service.local import Runtime
from fewstep.runtime.service.metrics import SECONDS, Histogram, Tally

from .health import Health
from .visit import Visit

OVERHEAD = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)


class Meters(Collector):
    """What one server measures; `render` reads the runtime afresh each time."""

    def __init__(self, runtime: Runtime, health: Health) -> None:
        self._runtime, self._health = runtime, health
        self._encode_s = Tally(SECONDS)
        self._http_s: dict[str, Tally] = {}
        self._overhead_s = Tally(OVERHEAD)
        self._keyed: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()  # requests end on the runtime's thread
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._responses: Counter[tuple[str, str]] = Counter()

    def add(self, collector: Collector) -> None:
        """Show another part's metrics as well."""
        self._registry.register(collector)

    def response(self, route: str, status: int) -> None:
        self._responses[route, str(status)] += 1

    def encoded(self, seconds: float) -> None:
        self._encode_s.add(seconds)

    def visited(self, visit: Visit, seconds: float) -> None:
        """A call has ended; a socket, whose length is up to the caller, is left out."""
        if visit.method != "WEBSOCKET":
            self._http_s.setdefault(visit.route, Tally(SECONDS)).add(seconds)
            if visit.made is not None:
                self._overhead_s.add(max(0.0, seconds - visit.inner_s))

    def decided(self, key: str, decision: str) -> None:
        """What became of a request of the key with this name ("" without keys), as `visit.Door` says it."""
        with self._lock:
            self._keyed[key, decision] += 1

    def render(self) -> tuple[bytes, str]:
        """(page, media type)."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def collect(self) -> Iterator[Metric]:
        now = self._runtime.metrics()
        stages = {**now.stage_s, "file": self._encode_s.value()}
        yield _histograms(
            "fewstep_stage_seconds", "Seconds per engine call, or per request for its picture files.", stages, "stage"
        )
        yield _histograms("fewstep_batch_size", "Rows per engine call of each stage.", now.batch_size, "stage")
        about = "Requests that share an engine call."
        yield _histograms("fewstep_requests_per_call", about, now.requests_per_call, "stage")
        about = "Denoiser calls whose rows differ in this: the request, the step, whether a picture steers them."
        yield _counters("fewstep_mixed_calls", about, now.mixed, "by")
        about = "|predicted / actual - 1| of the time that finished requests took."
        yield _histograms("fewstep_forecast_error", about, {"": now.forecast_error})
        https = {route: tally.value() for route, tally in self._http_s.items()}
        yield _histograms("fewstep_http_seconds", "HTTP call until its end, by route.", https, "route")
        about = "Seconds of a call that made pictures outside the runtime and the encoder."
        yield _histograms("fewstep_http_overhead_seconds", about, {"": self._overhead_s.value()})
        yield _histograms("fewstep_request_seconds", "Submitted until the final event.", {"": now.request_s})
        yield _histograms("fewstep_queue_seconds", "Accepted until the first engine call.", {"": now.queue_s})
        responses = {key: float(count) for key, count in self._responses.items()}
        about = "HTTP responses by route and status."
        yield _counters("fewstep_http_responses", about, responses, "route", "status")
        with self._lock:
            keyed = dict(self._keyed)
        about = "Requests by the name of their key, and what was decided and became of them."
        yield _counters("fewstep_key_requests", about, keyed, "key", "decision")
        outcomes = {"Finished": now.finished, **now.failed}
        yield _counters("fewstep_requests", "Ended requests by outcome.", outcomes, "outcome")
        yield _counters("fewstep_rejected", "Requests refused at the door.", now.rejected, "reason")
        about = "Requests let in, and those refused by the scheduler, with the reason."
        yield _counters("fewstep_admissions", about, {"accepted": now.accepted, **now.rejected}, "decision")
        missed = now.failed.get("DeadlineExceeded", 0)
        yield CounterMetricFamily("fewstep_deadline_misses", "Requests let in that were too late.", value=missed)
        yield _histograms("fewstep_model_load_seconds", "Until a model was there.", {"": now.load_s})
        yield CounterMetricFamily("fewstep_models_put_out", "Models that left memory for others.", value=now.put_out)
        yield GaugeMetricFamily("fewstep_models_bytes", "Weights in memory.", value=now.memory_bytes)
        inside = GaugeMetricFamily("fewstep_model_in_memory", "1 while a model is in memory.", labels=["model"])
        for name, there in now.in_memory.items():
            inside.add_metric([name], there)
        yield inside
        cache = {"hit": now.text_cache_hits, "miss": now.text_cache_misses}
        yield _counters("fewstep_text_cache", "Prompt embeddings found and not found.", cache, "result")
        yield CounterMetricFamily("fewstep_pictures", "Pictures made.", value=now.pictures)
        yield GaugeMetricFamily("fewstep_requests_live", "Accepted requests that wait or run.", value=now.live)
        yield GaugeMetricFamily("fewstep_ready", "1 while /ready says yes.", value=self._health.look() == "ready")


def _counters(name: str, about: str, values: Mapping[Any, float], *labels: str) -> Metric:
    """Values by one label, or by tuples of several."""
    family = CounterMetricFamily(name, about, labels=labels)
    for key, value in values.items():
        family.add_metric([key] if isinstance(key, str) else key, value)
    return family


def _histograms(name: str, about: str, values: Mapping[str, Histogram], label: str | None = None) -> Metric:
    family = HistogramMetricFamily(name, about, labels=[label] if label else [])
    for key, value in values.items():
        edges = [*(f"{bound:g}" for bound in value.bounds), "+Inf"]
        buckets = list(zip(edges, accumulate(value.counts), strict=True))
        family.add_metric([key] if label else [], buckets=buckets, sum_value=value.total)
    return family
