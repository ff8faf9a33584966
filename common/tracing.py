"""Spans of what a request goes through, in OpenTelemetry's terms; next to free while nobody records them.

A request begins in `observed.py` of a service or in an operation of a client; all else is a step of it, and is made
only where the request is recorded. Whoever reads traces may see counts, sizes, names of models and reasons of errors:
no contents, keys, tokens, file names or texts of exceptions go into a span.
"""

import asyncio
import contextlib
from collections.abc import Iterator, Mapping, Sequence

import grpc
from opentelemetry import context, trace
from opentelemetry.trace import INVALID_SPAN, Link, Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

Attributes = Mapping[str, AttributeValue]

_TRACER = trace.get_tracer("splitsam")
_W3C = TraceContextTextMapPropagator()
# A server's span has failed where the server has; the caller's mistakes are the caller's.
_SERVERS_FAULT = frozenset(
    {
        grpc.StatusCode.UNKNOWN.name,
        grpc.StatusCode.DEADLINE_EXCEEDED.name,
        grpc.StatusCode.UNIMPLEMENTED.name,
        grpc.StatusCode.INTERNAL.name,
        grpc.StatusCode.UNAVAILABLE.name,
        grpc.StatusCode.DATA_LOSS.name,
    }
)


def begin(name: str, *, kind: SpanKind = SpanKind.INTERNAL, attributes: Attributes | None = None) -> Span:
    """A span below the current one, or the first of a trace; whoever begins it ends it."""
    return _TRACER.start_span(name, kind=kind, attributes=attributes)


def begin_request(method: str, metadata: Mapping[str, str | bytes], attributes: Attributes) -> Span:
    """The span of an RPC in its server, below the caller's, current for the rest of this task.

    It is not made un-current again: a stream that was dropped is closed in another context.

    Args:
        method: full gRPC method name.
        metadata: of the call; the caller's span is its `traceparent`.
    """
    carrier = {name: value for name in _W3C.fields if isinstance(value := metadata.get(name), str)}
    caller = _W3C.extract(carrier) if carrier else None
    name = method.removeprefix("/")
    rpc = {"rpc.system.name": "grpc", "rpc.method": name}
    span = _TRACER.start_span(name, caller, SpanKind.SERVER, {**rpc, **attributes})
    context.attach(trace.set_span_in_context(span))
    return span


def end_request(span: Span, code: str, reason: str | None) -> None:
    """End the span of an RPC.

    Args:
        code: the name of its gRPC status.
        reason: of our errors.
    """
    span.set_attribute("rpc.response.status_code", code)
    if reason is not None:
        span.set_attribute("error.type", reason)
    if code in _SERVERS_FAULT:
        span.set_status(StatusCode.ERROR, reason)
    span.end()


def trace_id_of(span: Span) -> str:
    """In hexadecimal digits, as it stands in log lines; empty where there is no trace."""
    found = span.get_span_context()
    return trace.format_trace_id(found.trace_id) if found.is_valid else ""


def current() -> Span:
    return trace.get_current_span()


def note(attributes: Attributes) -> None:
    """Add to the current span."""
    trace.get_current_span().set_attributes(attributes)


def step(
    name: str, attributes: Attributes | None = None, *, kind: SpanKind = SpanKind.INTERNAL
) -> contextlib.AbstractContextManager[Span]:
    """A part of what the current span does, current inside the block; nothing where that one is not recorded."""
    if not trace.get_current_span().is_recording():
        return contextlib.nullcontext(INVALID_SPAN)
    return _current_until_end(_TRACER.start_span(name, kind=kind, attributes=attributes))


@contextlib.contextmanager
def _current_until_end(span: Span) -> Iterator[Span]:
    with ended(span), within(span):
        yield span


def within(span: Span) -> contextlib.AbstractContextManager[Span]:
    """Make a span the current one inside the block, which may not yield to others in a generator."""
    return trace.use_span(span, record_exception=False, set_status_on_exception=False)


@contextlib.contextmanager
def ended(span: Span) -> Iterator[Span]:
    """End a span with the block, if it has not ended before; what is raised is marked on it by its reason alone."""
    try:
        yield span
    except (Exception, asyncio.CancelledError) as error:
        fail(span, error)
        raise
    finally:
        if span.is_recording():
            span.end()


def fail(span: Span, error: BaseException) -> None:
    """Mark a span that has not ended as failed."""
    if span.is_recording():
        reason = getattr(error, "reason", None)  # our errors' are stable names; other libraries' may be sentences
        name = reason if isinstance(reason, str) and reason.isidentifier() else type(error).__name__
        span.set_attribute("error.type", name)
        span.set_status(StatusCode.ERROR, name)


def begin_batch(name: str, requests: Sequence[Span], attributes: Attributes) -> list[Span]:
    """A span for each request of a batch, below that request's own.

    The first that is recorded is linked to all other requests, the others to the first, so each leads to all.

    Args:
        requests: their spans, recorded or not.
    """
    spans: list[Span] = []
    first: Span | None = None
    for number, request in enumerate(requests):
        if not request.is_recording():
            spans.append(INVALID_SPAN)
            continue
        others = requests[number + 1 :] if first is None else (first,)
        links = [Link(other.get_span_context()) for other in others if other.is_recording()]
        parent = trace.set_span_in_context(request)
        spans.append(_TRACER.start_span(name, parent, attributes=attributes, links=links))
        first = first or spans[-1]
    return spans


def carrier() -> tuple[tuple[str, str], ...]:
    """What takes the current span to a server, as gRPC metadata; empty where there is no trace."""
    headers: dict[str, str] = {}
    _W3C.inject(headers)
    return tuple(headers.items())
