"""What goes around every request: its id, who sends it, limits on its body, a line in the log, metrics."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Mapping

from opentelemetry.trace import SpanKind
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from splitsam.common import tracing
from splitsam.common.calls import Call, current_call
from splitsam.gateway.error_forms import INTERNAL, error_response
from splitsam.gateway.errors import GatewayError, too_large
from splitsam.gateway.metrics import GatewayMetrics

log = logging.getLogger("splitsam.gateway.requests")

_REQUEST_ID = re.compile(r"[!-~]{1,64}")
_CLOSED_BY_CALLER = 499
_READ_ON = 4
_PATH_CHARACTERS = 200
_QUIET = ("/livez", "/readyz", "/health")  # asked every few seconds


class Observed:
    """ASGI middleware, outside of everything else; answers every request with an `x-request-id`."""

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics):
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex[:16]
        status = _CLOSED_BY_CALLER

        async def observed_send(message: Message) -> None:
            nonlocal status
            if message["type"] in ("http.response.start", "websocket.accept"):
                status = message.get("status", 101)
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        start_s = time.perf_counter()
        method = scope.get("method", "POINTER")
        span = tracing.begin(f"gateway {method}", kind=SpanKind.SERVER)
        call = Call("", request_id, scope["path"], trace_id=tracing.trace_id_of(span))
        scope["splitsam.call"] = call
        token = current_call.set(call)
        self._metrics.in_progress.inc()
        try:
            with tracing.ended(span), tracing.within(span):
                await self._app(scope, receive, observed_send)
                span.set_attributes({"http.route": _route(scope), "http.response.status_code": status})
        except ClientDisconnect:  # in the middle of its body: nobody is there to be answered
            pass
        except Exception:
            log.exception("request failed", extra=call.names)
            if scope["type"] == "http" and status == _CLOSED_BY_CALLER:  # nothing has been answered yet
                await error_response(scope, INTERNAL)(scope, receive, observed_send)
        finally:
            self._metrics.in_progress.dec()
            current_call.reset(token)
            elapsed_s = time.perf_counter() - start_s
            route = _route(scope)
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.request_seconds.labels(route).observe(elapsed_s)
            log.log(
                logging.DEBUG if route in _QUIET and status < 400 else logging.INFO,
                "request",
                extra={
                    **call.names,
                    "method": method,
                    "path": _path(scope),
                    "status": status,
                    "ms": round(elapsed_s * 1000, 1),
                    "tenant": scope.get("splitsam.tenant") or "",
                },
            )


def _path(scope: Scope) -> str:
    """As it was sent, so that what it stands for breaks no line of the log."""
    sent: bytes = scope.get("raw_path", b"")
    return sent.decode("ascii", "backslashreplace")[:_PATH_CHARACTERS]


def _route(scope: Scope) -> str:
    """As the routes name themselves: no stranger gives a metric its label."""
    return getattr(scope.get("route"), "path", "unknown")


class BodyLimits:
    """ASGI middleware: the bytes of a body, and how long they may take to arrive once they are asked for.

    Args:
        max_bytes: by path; `default_bytes` for all others.
    """

    def __init__(self, app: ASGIApp, max_bytes: Mapping[str, int], default_bytes: int, timeout_s: float):
        self._app = app
        self._max_bytes = max_bytes
        self._default_bytes = default_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._max_bytes.get(scope["path"], self._default_bytes)
        announced = Headers(scope=scope).get("content-length", "")
        received = 0
        is_complete = False
        until_s: float | None = None  # what waits for a slot to be read in is not slow

        async def limited() -> Message:
            nonlocal received, is_complete, until_s
            if is_complete:
                return await receive()
            if until_s is None:
                until_s = asyncio.get_running_loop().time() + self._timeout_s
            promised = int(announced) if announced.isdecimal() else 0
            if promised > _READ_ON * limit:
                raise too_large("The request", limit)
            is_too_large = promised > limit
            try:
                async with asyncio.timeout_at(until_s):
                    while True:
                        message = await receive()
                        received += len(message.get("body", b""))
                        is_complete = not message.get("more_body", False)
                        is_too_large = is_too_large or received > limit
                        # A caller that still sends hears no answer: what is too large is read on for a while.
                        if not is_too_large or is_complete or received > _READ_ON * limit:
                            break
            except TimeoutError as error:
                raise GatewayError(408, "UPLOAD_TOO_SLOW", "The image took too long to arrive; try again.") from error
            if is_too_large:
                raise too_large("The request", limit)
            return message

        await self._app(scope, limited, send)
