"""The one interceptor around every RPC: identity, request id, readiness, metrics, log line and error mapping."""

import asyncio
import contextlib
import dataclasses
import functools
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2

from splitsam.common.auth import Authenticator
from splitsam.common.calls import Call, current_call
from splitsam.common.errors import InternalError, InvalidArgument, NotReady, ServiceError
from splitsam.common.metrics import Metrics
from splitsam.common.quotas import Quotas

log = logging.getLogger("splitsam.rpc")

ERROR_DOMAIN = "splitsam.v1"
# Whoever has just been answered calls again within this time, and is told to come back later.
_QUIET_S = 0.25
_OUR_METHODS = "/splitsam."
_HEALTH_METHODS = "/grpc.health."
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]]


class ServiceInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Lets health checks through, and wraps everything of splitsam.v1.

    Args:
        is_ready: False while the model loads or the process drains; calls are then answered UNAVAILABLE.
        check_room: takes a method's name and the tenant; raises where there is no room for such a call.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        quotas: Quotas,
        metrics: Metrics,
        is_ready: Callable[[], bool],
        check_room: Callable[[str, str], None],
    ):
        self._authenticator = authenticator
        self._quotas = quotas
        self._metrics = metrics
        self._is_ready = is_ready
        self._check_room = check_room
        self._running = 0
        self._idle = asyncio.Event()
        self._draining = asyncio.Event()

    async def drain(self, timeout_s: float) -> None:
        """Read no more from open streams, then wait until no call has run for a moment, but not for ever."""
        self._draining.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                self._idle.clear()
                while self._running or not self._idle.is_set():
                    self._idle.set()
                    await asyncio.sleep(_QUIET_S)

    def enter(self) -> None:
        self._running += 1
        self._metrics.in_progress.inc()
        self._idle.clear()

    def leave(self) -> None:
        self._running -= 1
        self._metrics.in_progress.dec()

    async def intercept_service(
        self, continuation: Continuation, details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(details)
        if handler is None or details.method.startswith(_HEALTH_METHODS):
            return handler  # gRPC answers an unknown method UNIMPLEMENTED; no stranger gives a metric its label
        metadata = dict(details.invocation_metadata)
        request_id = str(metadata.get("x-request-id", ""))[:64] or uuid.uuid4().hex[:16]
        is_ours = details.method.startswith(_OUR_METHODS)
        call = Call(tenant="", request_id=request_id, method=details.method)
        try:
            call = Call(self._authenticator.tenant(metadata), request_id, details.method)
            if is_ours and not self._is_ready():
                raise NotReady("the service is starting or shutting down", retry_delay_s=1.0)
            if is_ours:
                self._quotas.check(call.tenant)
                self._check_room(details.method.rpartition("/")[2], call.tenant)
        except ServiceError as error:
            return self._refusal(call, error)
        return self._wrapped(handler, call) if is_ours else handler

    def _refusal(self, call: Call, error: ServiceError) -> grpc.RpcMethodHandler:
        async def refuse(_requests: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            async with _Observed(self, call, context):
                raise error
            yield  # makes this a stream: the answer does not wait until the request's bytes are here

        return grpc.stream_stream_rpc_method_handler(refuse)

    def _wrapped(self, handler: grpc.RpcMethodHandler, call: Call) -> grpc.RpcMethodHandler:
        # Requests are parsed here: what grpc's own parsing raises reaches the caller as UNKNOWN, with its text.
        parse = functools.partial(_parsed, handler.request_deserializer)
        codecs = {"response_serializer": handler.response_serializer}

        async def unary(request: bytes, context: grpc.aio.ServicerContext) -> Any:
            async with _Observed(self, call, context):
                with self._quotas.admitted(call.tenant):
                    return await handler.unary_unary(parse(request), context)

        async def unary_stream(request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            async with _Observed(self, call, context):
                with self._quotas.admitted(call.tenant):
                    async with contextlib.aclosing(handler.unary_stream(parse(request), context)) as replies:
                        async for reply in replies:
                            yield reply

        async def stream(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            async with _Observed(self, call, context):
                with self._quotas.admitted(call.tenant):
                    read = self._until_draining(requests, parse, call.tenant)
                    async with contextlib.aclosing(handler.stream_stream(read, context)) as replies:
                        async for reply in replies:
                            yield reply

        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(unary, **codecs)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(unary_stream, **codecs)
        return grpc.stream_stream_rpc_method_handler(stream, **codecs)

    async def _until_draining(
        self, requests: AsyncIterator[bytes], parse: Callable[[bytes], Any], tenant: str
    ) -> AsyncIterator[Any]:
        """A stream's requests, as fast as the tenant may send them; they end when the process drains."""
        draining = asyncio.ensure_future(self._draining.wait())
        upcoming: asyncio.Future[bytes | None] | None = None
        try:
            while True:
                upcoming = asyncio.ensure_future(_next(requests))
                await asyncio.wait({upcoming, draining}, return_when=asyncio.FIRST_COMPLETED)
                if not upcoming.done() or (request := upcoming.result()) is None:
                    return
                await self._quotas.pace(tenant)
                yield parse(request)
        finally:
            draining.cancel()
            if upcoming is not None:
                upcoming.cancel()


async def _next(requests: AsyncIterator[bytes]) -> bytes | None:
    return await anext(requests, None)


def _parsed(deserialize: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        return deserialize(data)
    except DecodeError as error:
        raise InvalidArgument("request", "is not a message of this method") from error


class _Observed:
    """Around one RPC: sets the call, counts, logs, and turns what was raised into a status."""

    def __init__(self, interceptor: ServiceInterceptor, call: Call, context: grpc.aio.ServicerContext):
        self._interceptor = interceptor
        self._call = call
        self._context = context

    async def __aenter__(self) -> None:
        self._interceptor.enter()
        self._start_s = time.perf_counter()
        current_call.set(dataclasses.replace(self._call, deadline_s=self._deadline_s()))
        self._context.set_trailing_metadata((("x-request-id", self._call.request_id),))

    def _deadline_s(self) -> float | None:
        remaining_s = self._context.time_remaining()
        return None if remaining_s is None else time.monotonic() + remaining_s

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        self._interceptor.leave()
        elapsed_s = time.perf_counter() - self._start_s
        method = self._call.method.rpartition("/")[2]
        failure = _as_service_error(error)
        if failure is not None and failure.code == grpc.StatusCode.RESOURCE_EXHAUSTED:
            self._interceptor._metrics.refusals.labels(method, failure.reason).inc()
        code = "CANCELLED" if _is_cancelled(error) else failure.code.name if failure else "OK"
        self._interceptor._metrics.requests.labels(method, code).inc()
        self._interceptor._metrics.request_seconds.labels(method).observe(elapsed_s)
        extra = {
            "request_id": self._call.request_id,  # not from the context: a dropped stream is closed in another
            "method": method,
            "code": code,
            "ms": round(elapsed_s * 1000, 1),
            "tenant": self._call.tenant,
        }
        if failure is not None and failure.code == grpc.StatusCode.INTERNAL:
            log.error("rpc failed", extra=extra, exc_info=error)
        else:
            log.info("rpc", extra=extra | ({"reason": failure.reason} if failure else {}))
        if failure is not None:
            await abort_with(self._context, failure, self._call.request_id)


def _is_cancelled(error: BaseException | None) -> bool:
    return isinstance(error, (asyncio.CancelledError, GeneratorExit))


def _as_service_error(error: BaseException | None) -> ServiceError | None:
    """What the caller is told: our own errors as they are, any other defect without its details."""
    if error is None or isinstance(error, ServiceError):
        return error
    if isinstance(error, grpc.aio.AbortError) or not isinstance(error, Exception):
        return None  # already answered, or cancelled
    return InternalError("internal error; the request id names it in the server's log")


async def abort_with(context: grpc.aio.ServicerContext, error: ServiceError, request_id: str) -> None:
    """Answer with a rich status: ErrorInfo always, BadRequest and RetryInfo where they apply."""
    trailing = [("grpc-status-details-bin", rich_status(error, request_id).SerializeToString())]
    trailing.append(("x-request-id", request_id))
    if error.retry_delay_s is not None:
        trailing.append(("grpc-retry-pushback-ms", str(round(error.retry_delay_s * 1000))))
    await context.abort(error.code, error.message, trailing_metadata=tuple(trailing))


def rich_status(error: ServiceError, request_id: str) -> status_pb2.Status:
    metadata: Mapping[str, str] = {**error.metadata, "request_id": request_id}
    details: list[Any] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN, metadata=metadata),
    ]
    if error.violations:
        violations = [
            error_details_pb2.BadRequest.FieldViolation(field=v.field, description=v.description)
            for v in error.violations
        ]
        details.append(error_details_pb2.BadRequest(field_violations=violations))
    if error.retry_delay_s is not None:
        delay = Duration()
        delay.FromNanoseconds(round(error.retry_delay_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        message = AnyMessage()
        message.Pack(detail)
        packed.append(message)
    return status_pb2.Status(code=getattr(code_pb2, error.code.name), message=error.message, details=packed)
