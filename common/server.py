"""Running a service: port bound at once, ready when the model is, drained on SIGTERM."""

import asyncio
import gc
import logging
import math
import signal
import sys
import time
from typing import Protocol

import google.protobuf
import grpc
from google.protobuf.internal import api_implementation
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from splitsam.common.auth import Authenticator
from splitsam.common.errors import DeviceLost
from splitsam.common.interceptor import ServiceInterceptor
from splitsam.common.listeners import channel_options, listening
from splitsam.common.logs import configure_logs
from splitsam.common.loop_lag import watch_loop_lag
from splitsam.common.memory import keep_freed_memory
from splitsam.common.metrics import Metrics
from splitsam.common.quotas import Quotas
from splitsam.common.settings import ProcessSettings, ServiceSettings
from splitsam.common.uploads import Uploads

log = logging.getLogger("splitsam.server")

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
# Whoever still runs on a failed device is told so at once.
_LOST_GRACE_S = 2.0
# A thread that runs a batch gives the interpreter up at every wait for its device, and would get it back from a busy
# event loop only after Python's 5 ms.
_SWITCH_INTERVAL_S = 1e-4


class Service(Protocol):
    """What runs inside the scaffold.

    Args:
        large_requests: the methods whose requests may hold an image or logits; those of all others are small.
    """

    full_name: str
    large_requests: frozenset[str]

    def register(self, server: grpc.aio.Server) -> None:
        """Add the servicer's handlers."""

    def check_room(self, method: str, tenant: str) -> None:
        """Raise QueueFull where a call of a tenant would only be refused after it has been read."""

    async def open(self) -> None:
        """Load and warm up; the service is ready when this returns."""

    async def lost(self) -> str:
        """Wait until it cannot serve any more, in vain as long as all is well; why."""

    async def close(self) -> None:
        """Finish what was accepted, then let go of model and connections."""


async def serve(settings: ServiceSettings, service: Service, metrics: Metrics) -> None:
    """Serve until SIGTERM or SIGINT; returns after the drain.

    Raises:
        DeviceLost: the process cannot serve any more; callers were turned away.
    """
    lost = ""
    metrics.enter("loading")
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    ready = asyncio.Event()
    authenticator = Authenticator(settings.tokens_file, metrics)
    interceptor = ServiceInterceptor(
        authenticator,
        Uploads(settings, metrics, service.large_requests),
        Quotas.from_settings(settings),
        metrics,
        ready.is_set,
        service.check_room,
    )
    server = grpc.aio.server(interceptors=[interceptor], options=channel_options(settings))
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    service.register(server)
    names = ("", service.full_name)
    for name in names:
        await checks.set(name, _NOT_SERVING)
    if settings.reflection:
        reflection.enable_server_reflection((service.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    async with listening(settings, server, checks, metrics) as port:
        log.info("listening", extra={"address": f"{settings.host}:{port}", "service": service.full_name})
        watching = [
            asyncio.create_task(watch_loop_lag(metrics, ready)),
            asyncio.create_task(authenticator.watch(settings.tokens_reload_ms / 1000)),
        ]
        try:
            if await _until_open(service, stop):
                # What is here to stay, above all PyTorch's modules, no longer costs a pause to look through.
                gc.collect()
                gc.freeze()
                ready.set()
                metrics.enter("serving")
                for name in names:
                    await checks.set(name, _SERVING)
                log.info("ready", extra={"service": service.full_name})
                lost = await _until_told(service, server, stop)
        finally:
            metrics.enter("draining")
            log.info("draining", extra={"service": service.full_name})
            for name in names:
                await checks.set(name, _NOT_SERVING)
            if ready.is_set() and not lost:
                await asyncio.sleep(settings.drain_delay_ms / 1000)
            # grpc.aio ends calls that arrive while it stops as CANCELLED, which nobody sends again: so turn them away
            # with UNAVAILABLE first, and stop when the running calls have ended and those refused know.
            ready.clear()
            grace_s = min(settings.grace_ms / 1000, _LOST_GRACE_S if lost else math.inf)
            until_s = time.monotonic() + grace_s
            await interceptor.drain(grace_s)
            await server.stop(max(0.0, until_s - time.monotonic()))
            for task in watching:
                task.cancel()
            if lost:
                raise DeviceLost(lost)
            await service.close()
            log.info("stopped", extra={"service": service.full_name})


async def _until_told(service: Service, server: grpc.aio.Server, stop: asyncio.Event) -> str:
    """Wait for the end: empty when it was asked for, else why the process cannot go on."""
    losing = asyncio.ensure_future(service.lost())
    # It ends of a request whose path is not UTF-8 (grpc 1.85.1), and would leave a process that nobody can call.
    ending = asyncio.ensure_future(server.wait_for_termination())
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({losing, ending, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if losing.done():
            return f"the device failed: {losing.result()}"
        return f"gRPC's server ended: {ending.exception()!r}" if ending.done() else ""
    finally:
        losing.cancel()
        stopping.cancel()  # `ending` ends with the server, which could not be stopped were it cancelled


async def _until_open(service: Service, stop: asyncio.Event) -> bool:
    """Open the service; False when a stop was asked for first."""
    opening = asyncio.ensure_future(service.open())
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({opening, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if opening.done():
            await opening
        return opening.done()
    finally:
        stopping.cancel()
        opening.cancel()


def prepare_process(settings: ProcessSettings) -> None:
    """What a service's process does first: logs, the settings in the log, threads, memory, which protobuf."""
    configure_logs(log_format=settings.log_format, level=settings.log_level)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    keep_freed_memory()
    log.info("settings", extra={"settings": settings.for_log()})
    parser = api_implementation.Type()
    if parser != "upb":
        raise RuntimeError(f"protobuf {google.protobuf.__version__} runs its {parser} parser; only upb is supported")
