"""Sends spans to a collector, over OTLP and gRPC, when OpenTelemetry's own environment variables ask for it.

OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT switches it on, or OTEL_TRACES_EXPORTER=otlp;
OTEL_SDK_DISABLED=true or OTEL_TRACES_EXPORTER=none switches it off. All other variables are read by the SDK, which is
imported only when it is on: https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
"""

import contextlib
import importlib.metadata
import os
import threading
from collections.abc import Iterator

from opentelemetry import trace

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
# A collector that is away holds up nobody's end for longer.
_FLUSH_S = 3.0


class TraceExportProblem(ValueError):
    """Traces are asked for and cannot be had; the message names the variable and what it takes."""


@contextlib.contextmanager
def exporting(service_name: str) -> Iterator[None]:
    """Export this process's spans, if asked for, until the block ends; once in a process.

    Args:
        service_name: where OTEL_SERVICE_NAME gives none.

    Raises:
        TraceExportProblem: they are asked for in a way that this process cannot serve.
    """
    if not _is_asked_for():
        yield
        return
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise TraceExportProblem("the environment asks for traces (OTEL_...): install splitsam[tracing]") from error
    own = {"service.name": service_name, "service.version": importlib.metadata.version("splitsam")}
    resource = Resource.create({**own, **OTELResourceDetector().detect().attributes})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter()
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        limit = threading.Timer(_FLUSH_S, exporter.shutdown)
        limit.daemon = True
        limit.start()
        provider.shutdown()
        limit.cancel()


def _is_asked_for() -> bool:
    exporter = _variable("OTEL_TRACES_EXPORTER")
    if _variable("OTEL_SDK_DISABLED") == "true" or exporter == "none":
        return False
    if not exporter and not any(_variable(name) for name in _ENDPOINTS):
        return False
    if exporter not in ("", "otlp"):
        raise TraceExportProblem(f"OTEL_TRACES_EXPORTER: otlp or none, not {exporter!r}")
    protocol = next((value for name in _PROTOCOLS if (value := _variable(name))), "grpc")
    if protocol != "grpc":
        raise TraceExportProblem(f"OTEL_EXPORTER_OTLP_PROTOCOL: grpc is the only one that is served, not {protocol!r}")
    return True


def _variable(name: str) -> str:
    return os.environ.get(name, "").strip().lower()
