"""The ports of a service: calls with or without TLS, health alone in plaintext, metrics; and what callers may do."""

import asyncio
import contextlib
import ipaddress
import logging
from collections.abc import AsyncIterator, Sequence

import grpc
from grpc_health.v1 import health, health_pb2_grpc

from splitsam.common.certificates import ServerCertificate
from splitsam.common.metrics import Metrics
from splitsam.common.settings import ServiceSettings, SettingsProblem

log = logging.getLogger("splitsam.server")

# A caller that does not answer a ping for this long is gone.
_PING_TIMEOUT_MS = 20_000


def channel_options(settings: ServiceSettings) -> Sequence[tuple[str, int]]:
    """What gRPC allows a caller, and when it ends a connection."""
    options = [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_reply_bytes),
        ("grpc.max_concurrent_streams", settings.max_concurrent_streams),
        # It refuses calls of callers that keep to the limit while others of theirs are ending (seen in grpc 1.85.1).
        ("grpc.http.overload_protection", 0),
        *_connection_options(settings),
    ]
    if settings.max_connection_age_ms:
        # Running calls may end: the connection only takes no new ones.
        options.append(("grpc.max_connection_age_ms", settings.max_connection_age_ms))
    return options


def _connection_options(settings: ServiceSettings) -> Sequence[tuple[str, int]]:
    return [
        ("grpc.server_handshake_timeout_ms", settings.handshake_timeout_ms),
        # Strict clients ping idle connections; without the second they are sent away for "too many pings".
        ("grpc.http2.min_ping_interval_without_data_ms", settings.min_ping_interval_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        # Callers that vanished without a word give their streams back.
        ("grpc.keepalive_time_ms", settings.keepalive_ms),
        ("grpc.keepalive_timeout_ms", _PING_TIMEOUT_MS),
        ("grpc.so_reuseport", 0),
        # gRPC would let fast callers send megabytes of a request that nobody reads yet; this way it is 64 KiB.
        ("grpc.http2.bdp_probe", 0),
    ]


@contextlib.asynccontextmanager
async def listening(
    settings: ServiceSettings, server: grpc.aio.Server, checks: health.aio.HealthServicer, metrics: Metrics
) -> AsyncIterator[int]:
    """Bind all ports and start the server, which its owner stops; the port for calls is given.

    Raises:
        SettingsProblem: a port is taken, the host is not this machine's, or the certificate is bad.
    """
    certificate = ServerCertificate.of(settings, metrics)
    port = _bind(server, settings.host, settings.port, certificate, "port")
    probes = _health_server(settings, checks)
    try:
        if settings.metrics_port:
            metrics.serve(settings.host.strip("[]"), settings.metrics_port)
    except OSError as error:
        raise SettingsProblem(f"metrics_port: cannot listen on port {settings.metrics_port}: {error}") from error
    if certificate is None and settings.tokens_file is not None and not is_loopback(settings.host):
        log.warning("tokens and images arrive in clear text unless a mesh or proxy wraps them: tls_cert_file is unset")
    await server.start()
    await probes.start()
    watch = asyncio.ensure_future(certificate.watch(settings.tls_reload_ms / 1000)) if certificate else None
    try:
        yield port
    finally:
        if watch is not None:
            watch.cancel()
        await probes.stop(None)


def _health_server(settings: ServiceSettings, checks: health.aio.HealthServicer) -> grpc.aio.Server:
    """Health alone, in plaintext, for probes that speak no TLS; on no port when none is set."""
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 4096), *_connection_options(settings)])
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    if settings.health_port:
        _bind(server, settings.host, settings.health_port, None, "health_port")
    return server


def _bind(server: grpc.aio.Server, host: str, port: int, certificate: ServerCertificate | None, setting: str) -> int:
    address = f"{host}:{port}"
    try:
        if certificate is None:
            return int(server.add_insecure_port(address))
        return int(server.add_secure_port(address, certificate.credentials()))
    except (RuntimeError, UnicodeEncodeError) as error:  # the latter of a host whose bytes are no text
        raise SettingsProblem(f"{setting}: cannot listen on {address}: {error}") from error


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine can call an address to listen on."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host == "localhost"
