"""OpenTelemetry traces of calls: a server span, and under it what waited, what ran and what was encoded.

The extra `fewstep[otel]` brings the packages. The exporter is OTLP over HTTP and reads OpenTelemetry's own variables
(OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME, ...). A caller's `traceparent` header is continued.
"""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fewstep.runtime.sampling.events import Result

from .logs import visit_fields
from .settings import BadSetting
from .visit import Visit

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter


class Traces:
    """Spans of this server's calls, to one exporter. Nothing global is set.

    Errors: `BadSetting` where the packages are missing.
    """

    def __init__(self, exporter: "SpanExporter | None" = None) -> None:
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

                exporter = OTLPSpanExporter()
        except ImportError as error:
            raise BadSetting(f"FEWSTEP_TRACES needs {error.name}; run: pip install 'fewstep[otel]'") from error
        resource = Resource.create({"service.name": "fewstep"} if not _service_named() else {})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("fewstep")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, visit: Visit, headers: Mapping[str, str]) -> None:
        """Open the visit's span, under the caller's where the headers name one."""
        from opentelemetry.trace import SpanKind

        context = self._propagator.extract(dict(headers))
        visit.span = self._tracer.start_span(visit.method, context=context, kind=SpanKind.SERVER)

    def made(self, visit: Visit, result: Result, encode_s: float) -> None:
        """Add what one request took: `queue` and `run` as the runtime measured them, then `encode`, ending now."""
        timings = result.timings
        encoding = time.time_ns() - round(encode_s * 1e9)
        begun = encoding - round(timings.total_s * 1e9)
        started = begun + round(timings.queue_s * 1e9)
        about = {"fewstep.model": result.model, "fewstep.steps": result.steps, "fewstep.nfe": result.nfe}
        stages = {f"fewstep.{name}": getattr(timings, name) for name in ("text_s", "denoise_s", "decode_s")}
        self._child(visit, "queue", begun, started, {})
        self._child(visit, "run", started, encoding, {**about, **stages})
        self._child(visit, "encode", encoding, time.time_ns(), {"fewstep.pictures": len(result.pictures)})

    def end(self, visit: Visit, seconds: float) -> None:
        """Close the visit's span with what its log line has."""
        from opentelemetry.trace import Status, StatusCode

        span = visit.span
        span.update_name(f"{visit.method} {visit.route}")
        semantic = {"http.request.method": visit.method, "http.route": visit.route, "url.path": visit.path}
        own = {f"fewstep.{name}": value for name, value in visit_fields(visit, seconds).items()}
        span.set_attributes({**semantic, "http.response.status_code": visit.status, **own})
        if visit.status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()

    def _child(self, visit: Visit, name: str, begun: int, ended: int, about: dict[str, Any]) -> None:
        from opentelemetry.trace import set_span_in_context

        span = self._tracer.start_span(name, set_span_in_context(visit.span), start_time=begun, attributes=about)
        span.end(ended)


def _service_named() -> bool:
    import os

    return "OTEL_SERVICE_NAME" in os.environ or "service.name" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
