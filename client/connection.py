"""Where the services are and how to talk to them: addresses, channel options, TLS, credentials."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from splitsam.client.names import Address
from splitsam.common import tracing
from splitsam.common.calls import current_call

DEFAULT_ENCODER = "127.0.0.1:50051"
DEFAULT_DECODER = "127.0.0.1:50052"
# A replica that comes back is met again within about a second; one whose host is gone is waited for no longer than two.
_RECONNECT = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.min_reconnect_backoff_ms", 2_000),
)
# For targets whose several addresses gRPC finds out by itself: calls go to those that can be reached.
_ROUND_ROBIN = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})
_REQUEST_ID = "x-request-id"
_LOOPBACK = ("127.", "localhost", "[::1]", "ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D", "unix:")


@dataclass(frozen=True)
class TLS:
    """How to know the services and be known to them; files are PEM.

    Args:
        ca: the authorities to trust; None for the system's.
        cert, key: the caller's own pair, for mutual TLS.
        server_name: in the services' certificate, where that is not the address they are called at (a tunnel).
    """

    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = None
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        if (self.cert is None) != (self.key is None):
            raise ValueError("mutual TLS needs both cert and key")
        ca, key, cert = (None if path is None else Path(path).read_bytes() for path in (self.ca, self.key, self.cert))
        return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)


@dataclass(frozen=True)
class Connection:
    """Addresses of one deployment, as given, and who calls it.

    Args:
        caller: metadata of every call: the credentials, and what else is said of the caller.
    """

    encoders: tuple[str, ...]
    decoders: tuple[str, ...]
    caller: tuple[tuple[str, str], ...]
    tls: TLS | None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Of a call that is made now: who calls, the request it is made for, and the trace that it belongs to.

        A service that calls another is traced in both logs by one request id; elsewhere there is no current call.
        """
        call = current_call.get(None)
        is_named = any(name == _REQUEST_ID for name, _ in self.caller)
        request = () if call is None or is_named else ((_REQUEST_ID, call.request_id),)
        return (*self.caller, *request, *tracing.carrier())

    def open_channel(self, address: Address, grpc_module: Any = grpc, *, has_own_connection: bool = False) -> Any:
        """Open a channel of `grpc` or of `grpc.aio`; those to one address share a connection, or it gets its own."""
        options = channel_options(address)
        if has_own_connection:
            options.append(("grpc.use_local_subchannel_pool", 1))
        if self.tls is not None and self.tls.server_name is not None:
            options.append(("grpc.ssl_target_name_override", self.tls.server_name))
        elif address.name:  # what the certificate has to be for, and what proxies route by
            options.append(("grpc.default_authority", address.name))
        if self.tls is None:
            return grpc_module.insecure_channel(address.place, options=options)
        return grpc_module.secure_channel(address.place, self.tls.credentials(), options=options)


def connection(
    encoder: str | Sequence[str],
    decoder: str | Sequence[str],
    token: str | None = None,
    tls: TLS | bool | None = None,
) -> Connection:
    """Check and gather what a client was told about its deployment."""
    encoders, decoders = _addresses(encoder), _addresses(decoder)
    if not encoders or not decoders or not all(encoders + decoders):
        raise ValueError("the addresses of at least one encoder and at least one decoder are needed")
    credentials = (("authorization", f"Bearer {token}"),) if token else ()
    return Connection(encoders, decoders, credentials, TLS() if tls is True else tls or None)


def _addresses(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def channel_options(address: Address) -> list[tuple[str, Any]]:
    """Any image may be sent (the server names its own limit); answers stay under gRPC's default of 4 MiB."""
    options: list[tuple[str, Any]] = [
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.primary_user_agent", "splitsam-python"),
        ("grpc.service_config", _ROUND_ROBIN),
        *_RECONNECT,
    ]
    if address.name or address.place.startswith(_LOOPBACK):
        options.append(("grpc.enable_http_proxy", 0))
    return options


def rendezvous(addresses: Sequence[Address], key: str) -> tuple[Address, ...]:
    """The addresses in the order in which every client tries them for a key, by whatever names it knows them.

    Adding or removing one moves only its own share of keys.
    """
    ranks = {address: hashlib.sha256(f"{address.place}|{key}".encode()).digest() for address in addresses}
    return tuple(sorted(addresses, key=ranks.__getitem__, reverse=True))
