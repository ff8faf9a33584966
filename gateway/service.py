"""Running the gateway: port bound at once, certificate watched, drained on SIGTERM."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from splitsam.common.certificates import ServerCertificate
from splitsam.common.listeners import is_loopback
from splitsam.common.settings import SettingsProblem
from splitsam.gateway.app import build_app
from splitsam.gateway.metrics import GatewayMetrics
from splitsam.gateway.settings import GatewaySettings
from splitsam.gateway.tls import ServerTls

log = logging.getLogger("splitsam.gateway")

_BACKLOG = 2048
_MAX_MESSAGE_BYTES = 2**16  # of a WebSocket: a position with as many points as any service takes


class _Server(uvicorn.Server):
    """uvicorn, but told to stop by us: its own handling of signals has no wait before it refuses connections."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(settings: GatewaySettings) -> None:
    """Serve until SIGTERM or SIGINT; returns after the drain.

    Raises:
        SettingsProblem: the port is taken, the host is not this machine's, or a file cannot be used.
    """
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # our own lines say when it listens and who called
    metrics = GatewayMetrics()
    app = build_app(settings, metrics)
    certificate = ServerCertificate.of(settings, metrics)
    tls = None if certificate is None else ServerTls(certificate, settings)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        ws="websockets-sansio",
        ws_max_size=_MAX_MESSAGE_BYTES,
        ws_per_message_deflate=False,
        limit_concurrency=settings.max_connections,
        timeout_graceful_shutdown=max(1, round(settings.grace_ms / 1000)),
        server_header=False,
        proxy_headers=False,
        ssl_context_factory=None if tls is None else lambda _config, _default: tls.context,
    )
    server = _Server(config)
    try:
        if settings.metrics_port:
            metrics.serve(settings.host, settings.metrics_port)
    except OSError as error:
        raise SettingsProblem(f"metrics_port: cannot listen on port {settings.metrics_port}: {error}") from error
    listener = bind(settings)
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    beside = [asyncio.ensure_future(_stop_when_told(told, server, app, settings))]
    if tls is not None:
        beside.append(asyncio.ensure_future(tls.watch()))
    elif settings.tokens_file is not None and not is_loopback(settings.host):
        log.warning("tokens and images arrive in clear text unless a proxy wraps them: tls_cert_file is unset")
    log.info("listening", extra={"address": f"{settings.host}:{listener.getsockname()[1]}"})
    try:
        await server.serve([listener])
    finally:
        for task in beside:
            task.cancel()
        log.info("stopped")


async def _stop_when_told(told: asyncio.Event, server: uvicorn.Server, app: FastAPI, settings: GatewaySettings) -> None:
    await told.wait()
    log.info("draining")
    app.state.gateway.draining = True
    await asyncio.sleep(settings.drain_delay_ms / 1000)
    server.should_exit = True


def bind(settings: GatewaySettings) -> socket.socket:
    """A socket that listens.

    asyncio sends without delay only where a socket names its protocol, as those of `socket.create_server` do not: the
    head of an answer would wait for the caller's delayed acknowledgement, 40 ms, before the rest follows.

    Raises:
        SettingsProblem: the port is taken, or the host is not this machine's.
    """
    host = settings.host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, settings.port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise SettingsProblem(f"port: cannot listen on {settings.host}:{settings.port}: {error}") from error
    return listener
