"""A span for every request, by OpenTelemetry's own settings: with OTEL_EXPORTER_OTLP_ENDPOINT, or the one for traces,
set and the extra `trace` installed, spans go to that address. Otherwise nothing is imported and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Mapping

from sparsebert import environment


class Tracer:
    """Spans of a server. A request that says which trace it is part of (the header traceparent) goes on with it."""

    def __init__(self):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = TracerProvider(resource=Resource.create({"service.name": "sparsebert"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("sparsebert")
        self._propagator, self._kind = TraceContextTextMapPropagator(), SpanKind.SERVER
        self._error = Status(StatusCode.ERROR)

    def request(
        self, headers: Mapping[str, str], began: int, ended: int, method: str, route: str, status: int, facts: dict
    ) -> None:
        """A request that is over. headers: that it came with. began, ended: ns since 1970. facts: more attributes."""
        told = {"http.request.method": method, "http.route": route, "http.response.status_code": status, **facts}
        context = self._propagator.extract(headers)
        span = self._tracer.start_span(f"{method} {route}", context, self._kind, told, start_time=began)
        if status >= 500:
            span.set_status(self._error)
        span.end(ended)

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()


def tracer() -> Tracer | None:
    """None unless an endpoint is set. Raises ModuleNotFoundError without the extra."""
    return Tracer() if environment.wants_traces() else None
