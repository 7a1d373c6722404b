"""The runtime's counters and the server's own, as Prometheus reads them. One registry per app, nothing global."""

from collections.abc import Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from fewstep.runtime.local import Runtime
from fewstep.runtime.metrics import SECONDS, Histogram, Tally

from .health import Health


class Meters(Collector):
    """What one server measures; `render` reads the runtime afresh each time."""

    def __init__(self, runtime: Runtime, health: Health) -> None:
        self._runtime, self._health = runtime, health
        self._encode_s = Tally(SECONDS)
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._responses = Counter(
            "fewstep_http_responses",
            "HTTP responses by route and status.",
            ["route", "status"],
            registry=self._registry,
        )

    def response(self, route: str, status: int) -> None:
        self._responses.labels(route, str(status)).inc()

    def encoded(self, seconds: float) -> None:
        self._encode_s.add(seconds)

    def render(self) -> tuple[bytes, str]:
        """(page, media type)."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def collect(self) -> Iterator[Metric]:
        now = self._runtime.metrics()
        stages = {**now.stage_s, "encode": self._encode_s.value()}
        yield _histograms("fewstep_stage_seconds", "Seconds per engine call, or per encoded request.", stages, "stage")
        yield _histograms("fewstep_batch_size", "Rows per engine call of each stage.", now.batch_size, "stage")
        yield _histograms("fewstep_request_seconds", "Submitted until the final event.", {"": now.request_s})
        yield _histograms("fewstep_queue_seconds", "Accepted until the first engine call.", {"": now.queue_s})
        outcomes = {"Finished": now.finished, **now.failed}
        yield _counters("fewstep_requests", "Ended requests by outcome.", outcomes, "outcome")
        yield _counters("fewstep_rejected", "Requests refused at the door.", now.rejected, "reason")
        cache = {"hit": now.text_cache_hits, "miss": now.text_cache_misses}
        yield _counters("fewstep_text_cache", "Prompt embeddings found and not found.", cache, "result")
        yield CounterMetricFamily("fewstep_pictures", "Pictures made.", value=now.pictures)
        yield GaugeMetricFamily("fewstep_requests_live", "Accepted requests that wait or run.", value=now.live)
        yield GaugeMetricFamily("fewstep_ready", "1 while /ready says yes.", value=self._health.state == "ready")


def _counters(name: str, about: str, values: Mapping[str, int], label: str) -> Metric:
    family = CounterMetricFamily(name, about, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _histograms(name: str, about: str, values: Mapping[str, Histogram], label: str | None = None) -> Metric:
    family = HistogramMetricFamily(name, about, labels=[label] if label else [])
    for key, value in values.items():
        edges = [*(f"{bound:g}" for bound in value.bounds), "+Inf"]
        buckets = list(zip(edges, accumulate(value.counts), strict=True))
        family.add_metric([key] if label else [], buckets=buckets, sum_value=value.total)
    return family
