"""The one interceptor around every RPC: identity, request id, readiness, quotas, room for the request, drain."""

import asyncio
import contextlib
import functools
import re
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from splitsam.common.auth import Authenticator, Visit
from splitsam.common.calls import Call
from splitsam.common.errors import InvalidArgument, NotReady, ServiceError
from splitsam.common.metrics import Metrics
from splitsam.common.observed import Observed, RunningCalls
from splitsam.common.quotas import Quotas
from splitsam.common.uploads import Uploads

_REQUEST_ID = re.compile(r"[!-~]+")
_SENDABLE = re.compile(r"[ -~]*")
_OUR_METHODS = "/splitsam."
_HEALTH_METHODS = "/grpc.health."
_UNCOUNTED = "GetModelInfo"  # costs less than a refusal, and probes and dashboards ask it of a service that is full
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]]


class ServiceInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Lets health checks through, and wraps everything of splitsam.v1.

    Args:
        uploads: room for requests in memory; a call is read when there is some.
        is_ready: False while the model loads or the process drains; calls are then answered UNAVAILABLE.
        check_room: takes a method's name and the tenant; raises where there is no room for such a call.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        uploads: Uploads,
        quotas: Quotas,
        metrics: Metrics,
        is_ready: Callable[[], bool],
        check_room: Callable[[str, str], None],
    ):
        self._authenticator = authenticator
        self._uploads = uploads
        self._quotas = quotas
        self._metrics = metrics
        self._is_ready = is_ready
        self._check_room = check_room
        self._running = RunningCalls(metrics)
        self._draining = asyncio.Event()

    async def drain(self, timeout_s: float) -> None:
        """Read no more from open streams, then wait until no call has run for a moment, but not for ever."""
        self._draining.set()
        await self._running.until_quiet(timeout_s)

    async def intercept_service(
        self, continuation: Continuation, details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(details)
        if handler is None or details.method.startswith(_HEALTH_METHODS):
            return handler  # gRPC answers an unknown method UNIMPLEMENTED; no stranger gives a metric its label
        metadata = dict(details.invocation_metadata)
        request_id = _read_request_id(metadata)
        is_ours = details.method.startswith(_OUR_METHODS)
        call = Call(tenant="", request_id=request_id, method=details.method)
        try:
            visit = self._authenticator.visit(metadata)
            call = Call(visit.tenant, request_id, details.method, authorization=_read_credentials(metadata))
            if is_ours and not self._is_ready():
                raise NotReady("the service is starting or shutting down", retry_delay_s=1.0)
            if is_ours and _name_of(details.method) != _UNCOUNTED:
                self._quotas.check(call.tenant)
                self._check_room(_name_of(details.method), call.tenant)
        except ServiceError as error:
            return self._refusal(call, error)
        return self._wrapped(handler, call, visit) if is_ours else handler

    def _refusal(self, call: Call, error: ServiceError) -> grpc.RpcMethodHandler:
        async def refuse(_requests: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            async with Observed(self._running, self._metrics, call, context):
                raise error
            yield  # makes this a stream: the answer does not wait until the request's bytes are here

        return grpc.stream_stream_rpc_method_handler(refuse)

    def _wrapped(self, handler: grpc.RpcMethodHandler, call: Call, visit: Visit) -> grpc.RpcMethodHandler:
        # Requests are parsed here: what grpc's own parsing raises reaches the caller as UNKNOWN, with its text.
        parse = functools.partial(_parsed, handler.request_deserializer)
        codecs = {"response_serializer": handler.response_serializer}

        name = _name_of(call.method)
        uploads = self._uploads.of(name)

        # The request of a unary call is read as a stream of one: gRPC would have it in memory before asking anybody.
        # It stays in a frame that has ended when a refusal is raised, for that keeps the frames it is raised in.
        async def answer(context: grpc.aio.ServicerContext) -> Any:
            async with uploads.one(functools.partial(_read, context), parse) as request:
                return await handler.unary_unary(request, context)

        async def answers_to_one(context: grpc.aio.ServicerContext) -> AsyncGenerator[Any, None]:
            async with (
                uploads.one(functools.partial(_read, context), parse) as request,
                contextlib.aclosing(handler.unary_stream(request, context)) as replies,
            ):
                async for reply in replies:
                    yield reply

        async def answers_to_many(context: grpc.aio.ServicerContext) -> AsyncGenerator[Any, None]:
            held: list[int] = []
            requests = uploads.many(self._until_draining(context, visit), parse, held)
            try:
                async with contextlib.aclosing(handler.stream_stream(requests, context)) as replies:
                    async for reply in replies:
                        uploads.answered(held)
                        yield reply
            finally:
                uploads.let_go(held)

        async def unary(_requests: Any, context: grpc.aio.ServicerContext) -> Any:
            async with Observed(self._running, self._metrics, call, context):
                with contextlib.nullcontext() if name == _UNCOUNTED else self._quotas.admitted(call.tenant):
                    return await answer(context)

        async def stream(_requests: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            answers = answers_to_one if handler.unary_stream else answers_to_many
            async with Observed(self._running, self._metrics, call, context):
                with self._quotas.admitted(call.tenant):
                    async with contextlib.aclosing(answers(context)) as replies:
                        async for reply in replies:
                            yield reply

        if handler.unary_unary:
            return grpc.stream_unary_rpc_method_handler(unary, **codecs)
        return grpc.stream_stream_rpc_method_handler(stream, **codecs)

    async def _until_draining(self, context: grpc.aio.ServicerContext, visit: Visit) -> AsyncIterator[bytes]:
        """A stream's requests, as fast as the tenant may send them; they end when the process drains.

        Raises:
            Unauthenticated: one came after the caller's token was revoked.
        """
        draining = asyncio.ensure_future(self._draining.wait())
        upcoming: asyncio.Future[bytes | None] | None = None
        try:
            while True:
                upcoming = asyncio.ensure_future(_read(context))
                await asyncio.wait({upcoming, draining}, return_when=asyncio.FIRST_COMPLETED)
                if not upcoming.done() or (request := upcoming.result()) is None:
                    return
                visit.check()
                await self._quotas.pace(visit.tenant)
                yield request
                del request  # it would lie in memory until the next one comes
        finally:
            draining.cancel()
            if upcoming is not None:
                upcoming.cancel()


def _name_of(method: str) -> str:
    """Without the service's."""
    return method.rpartition("/")[2]


def _read_request_id(metadata: Mapping[str, str | bytes]) -> str:
    """The caller's, or a new one where gRPC could not send it back or it would break a line of the log."""
    given = str(metadata.get("x-request-id", ""))[:64]
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex[:16]


def _read_credentials(metadata: Mapping[str, str | bytes]) -> str:
    """The caller's, or none where gRPC could not send them on; they are nobody's token then."""
    given = metadata.get("authorization", "")
    return given if isinstance(given, str) and _SENDABLE.fullmatch(given) else ""


async def _read(context: grpc.aio.ServicerContext) -> bytes | None:
    """The next request of a call, None at the end.

    Not from the iterator that gRPC hands over: that keeps each message until the next one, and until the garbage is
    collected (grpc 1.85.1).
    """
    data = await context.read()
    return None if data is grpc.aio.EOF else data


def _parsed(deserialize: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        return deserialize(data)
    except DecodeError as error:
        raise InvalidArgument("request", "is not a message of this method") from error
