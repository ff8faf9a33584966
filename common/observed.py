"""What goes around every RPC: it is counted, timed, logged and traced, and what it raises becomes a status."""

import asyncio
import contextlib
import dataclasses
import logging
import time
import traceback

import grpc

from splitsam.common import tracing
from splitsam.common.calls import Call, current_call
from splitsam.common.errors import InternalError, ServiceError
from splitsam.common.metrics import Metrics
from splitsam.common.status import abort_with

log = logging.getLogger("splitsam.rpc")

# Whoever has just been answered calls again within this time, and is told to come back later.
_QUIET_S = 0.25


class RunningCalls:
    """Counts the calls in progress."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._count = 0
        self._idle = asyncio.Event()

    def enter(self) -> None:
        self._count += 1
        self._metrics.in_progress.inc()
        self._idle.clear()

    def leave(self) -> None:
        self._count -= 1
        self._metrics.in_progress.dec()

    async def until_quiet(self, timeout_s: float) -> None:
        """Wait until no call has run for a moment, but not for ever."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                self._idle.clear()
                while self._count or not self._idle.is_set():
                    self._idle.set()
                    await asyncio.sleep(_QUIET_S)


class Observed:
    """Around one RPC: sets the call, counts, logs, and turns what was raised into a status."""

    def __init__(self, running: RunningCalls, metrics: Metrics, call: Call, context: grpc.aio.ServicerContext):
        self._running = running
        self._metrics = metrics
        self._call = call
        self._context = context

    async def __aenter__(self) -> None:
        self._running.enter()
        self._start_s = time.perf_counter()
        about = {"splitsam.request_id": self._call.request_id, "splitsam.tenant": self._call.tenant}
        self._span = tracing.begin_request(self._call.method, dict(self._context.invocation_metadata() or ()), about)
        trace_id = tracing.trace_id_of(self._span)
        self._call = dataclasses.replace(self._call, deadline_s=self._deadline_s(), trace_id=trace_id)
        current_call.set(self._call)
        self._context.set_trailing_metadata((("x-request-id", self._call.request_id),))

    def _deadline_s(self) -> float | None:
        remaining_s = self._context.time_remaining()
        return None if remaining_s is None else time.monotonic() + remaining_s

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        self._running.leave()
        elapsed_s = time.perf_counter() - self._start_s
        method = self._call.method.rpartition("/")[2]
        failure = _as_service_error(error)
        if failure is not None and failure.code == grpc.StatusCode.RESOURCE_EXHAUSTED:
            self._metrics.refusals.labels(method, failure.reason).inc()
        code = "CANCELLED" if _is_cancelled(error) else failure.code.name if failure else "OK"
        self._metrics.requests.labels(method, code).inc()
        self._metrics.request_seconds.labels(method).observe(elapsed_s)
        tracing.end_request(self._span, code, failure.reason if failure else None)
        extra = {
            **self._call.names,  # not from the context: a dropped stream is closed in another
            "method": method,
            "code": code,
            "ms": round(elapsed_s * 1000, 1),
            "tenant": self._call.tenant,
        }
        if failure is not None and failure.code == grpc.StatusCode.INTERNAL:
            log.error("rpc failed", extra=extra, exc_info=error)
        else:
            log.info("rpc", extra=extra | ({"reason": failure.reason} if failure else {}))
        _let_go(error)
        if failure is not None:
            await abort_with(self._context, failure, self._call.request_id)


def _let_go(error: BaseException | None) -> None:
    """Empty the frames that an exception went through.

    They hold the request, and refer to the exception in turn: all would stay until the garbage is collected.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _is_cancelled(error: BaseException | None) -> bool:
    return isinstance(error, (asyncio.CancelledError, GeneratorExit))


def _as_service_error(error: BaseException | None) -> ServiceError | None:
    """What the caller is told: our own errors as they are, any other defect without its details."""
    if error is None or isinstance(error, ServiceError):
        return error
    if isinstance(error, grpc.aio.AbortError) or not isinstance(error, Exception):
        return None  # already answered, or cancelled
    return InternalError("internal error; the request id names it in the server's log")
