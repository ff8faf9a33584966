"""What a client shows of its operations in a trace: the operation, and every call that it takes."""

import contextlib
from collections.abc import Iterator

from opentelemetry.trace import Span, SpanKind

from splitsam.client.errors import SplitsamError
from splitsam.client.steps import Collect, Operation, T, Unary
from splitsam.common import tracing
from splitsam.common.trace_export import exporting


@contextlib.contextmanager
def program_span(name: str) -> Iterator[None]:
    """One trace for all that a program does with its client, exported if the environment asks for it."""
    with exporting("splitsam-client"), tracing.ended(tracing.begin(name)) as span, tracing.within(span):
        yield


def operation_span(operation: Operation[T]) -> contextlib.AbstractContextManager[Span]:
    """The span of an operation, ended with the block; not the current one by itself."""
    name = operation.gi_code.co_name  # type: ignore[attr-defined]  # of the generator function
    return tracing.ended(tracing.begin(f"splitsam {name}"))


@contextlib.contextmanager
def call_span(step: Unary | Collect) -> Iterator[None]:
    """The span of one call to one replica, current inside the block."""
    service = f"splitsam.v1.{step.service.capitalize()}Service"
    host, _, port = step.address.place.rpartition(":")
    rpc = {"rpc.system.name": "grpc", "rpc.method": f"{service}/{step.method}"}
    with tracing.step(f"{service}/{step.method}", rpc, kind=SpanKind.CLIENT) as span:
        span.set_attributes({"server.address": host, **({"server.port": int(port)} if port.isdecimal() else {})})
        try:
            yield
        except SplitsamError as error:
            span.set_attribute("rpc.response.status_code", error.code.name)
            raise
        span.set_attribute("rpc.response.status_code", "OK")
