"""Running a service: port bound at once, ready when the model is, drained on SIGTERM."""

import asyncio
import logging
import math
import signal
import time
from collections.abc import Sequence
from typing import Protocol

import google.protobuf
import grpc
from google.protobuf.internal import api_implementation
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from splitsam.common.auth import Authenticator
from splitsam.common.errors import DeviceLost
from splitsam.common.interceptor import ServiceInterceptor
from splitsam.common.logs import configure_logs
from splitsam.common.metrics import Metrics
from splitsam.common.quotas import Quotas
from splitsam.common.settings import ServiceSettings, SettingsProblem

log = logging.getLogger("splitsam.server")

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
# Room in a message around the largest image: field tags and a stream's request id.
_MESSAGE_OVERHEAD_BYTES = 2**16
# Whoever still runs on a failed device is told so at once.
_LOST_GRACE_S = 2.0


class Service(Protocol):
    """What runs inside the scaffold."""

    full_name: str

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
        DeviceLost: the service cannot serve any more; callers were turned away.
    """
    lost = ""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    ready = asyncio.Event()
    interceptor = ServiceInterceptor(
        Authenticator.from_file(settings.tokens_file),
        Quotas.from_settings(settings),
        metrics,
        ready.is_set,
        service.check_room,
    )
    server = grpc.aio.server(interceptors=[interceptor], options=_channel_options(settings))
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    service.register(server)
    names = ("", service.full_name)
    for name in names:
        await checks.set(name, _NOT_SERVING)
    if settings.reflection:
        reflection.enable_server_reflection((service.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    port = _listen(settings, server, metrics)
    await server.start()
    log.info("listening", extra={"address": f"{settings.host}:{port}", "service": service.full_name})
    try:
        if await _until_open(service, stop):
            ready.set()
            for name in names:
                await checks.set(name, _SERVING)
            log.info("ready", extra={"service": service.full_name})
            lost = await _until_told(service, stop)
    finally:
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
        if lost:
            raise DeviceLost(f"the device failed: {lost}")
        await service.close()
        log.info("stopped", extra={"service": service.full_name})


def _listen(settings: ServiceSettings, server: grpc.aio.Server, metrics: Metrics) -> int:
    """Bind the ports; the gRPC one is returned.

    Raises:
        SettingsProblem: a port is taken, or the host is not this machine's.
    """
    address = f"{settings.host}:{settings.port}"
    try:
        port = int(server.add_insecure_port(address))
    except RuntimeError as error:
        raise SettingsProblem(f"port: cannot listen on {address}: {error}") from error
    try:
        if settings.metrics_port:
            metrics.serve(settings.host, settings.metrics_port)
    except OSError as error:
        raise SettingsProblem(f"metrics_port: cannot listen on port {settings.metrics_port}: {error}") from error
    return port


async def _until_told(service: Service, stop: asyncio.Event) -> str:
    """Wait for the end: empty when it was asked for, else why the service cannot go on."""
    losing = asyncio.ensure_future(service.lost())
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({losing, stopping}, return_when=asyncio.FIRST_COMPLETED)
        return losing.result() if losing.done() else ""
    finally:
        losing.cancel()
        stopping.cancel()


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


def prepare_process(settings: ServiceSettings) -> None:
    """What a service's process does first: logs, the settings in the log, and a check of protobuf's parser."""
    configure_logs(log_format=settings.log_format, level=settings.log_level)
    log.info("settings", extra={"settings": settings.for_log()})
    parser = api_implementation.Type()
    if parser != "upb":
        raise RuntimeError(f"protobuf {google.protobuf.__version__} runs its {parser} parser; only upb is supported")


def _channel_options(settings: ServiceSettings) -> Sequence[tuple[str, int]]:
    return (
        ("grpc.max_receive_message_length", settings.max_image_bytes + _MESSAGE_OVERHEAD_BYTES),
        ("grpc.max_send_message_length", settings.max_reply_bytes),
        # Strict clients ping idle connections; without this they are sent away for "too many pings".
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.so_reuseport", 0),
    )
