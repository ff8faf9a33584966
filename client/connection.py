"""Where the services are and how to talk to them: addresses, channel options, TLS, credentials."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

DEFAULT_ENCODER = "127.0.0.1:50051"
DEFAULT_DECODER = "127.0.0.1:50052"
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
    """Addresses and credentials of one deployment."""

    encoder: str
    decoders: tuple[str, ...]
    token: str | None
    tls: TLS | None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def open_channel(self, address: str, grpc_module: Any = grpc) -> Any:
        """Open a channel of `grpc` or of `grpc.aio`."""
        options = channel_options(address)
        if self.tls is None:
            return grpc_module.insecure_channel(address, options=options)
        if self.tls.server_name is not None:
            options.append(("grpc.ssl_target_name_override", self.tls.server_name))
        return grpc_module.secure_channel(address, self.tls.credentials(), options=options)


def connection(
    encoder: str, decoder: str | Sequence[str], token: str | None = None, tls: TLS | bool | None = None
) -> Connection:
    """Check and gather what a client was told about its deployment."""
    decoders = (decoder,) if isinstance(decoder, str) else tuple(decoder)
    if not encoder or not decoders or not all(decoders):
        raise ValueError("the addresses of an encoder and at least one decoder are needed")
    return Connection(encoder, decoders, token, TLS() if tls is True else tls or None)


def channel_options(address: str) -> list[tuple[str, Any]]:
    """Any image may be sent (the server names its own limit); answers stay under gRPC's default of 4 MiB."""
    options: list[tuple[str, Any]] = [
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.primary_user_agent", "splitsam-python"),
    ]
    if address.startswith(_LOOPBACK):
        options.append(("grpc.enable_http_proxy", 0))
    return options


def rendezvous(addresses: Sequence[str], key: str) -> str:
    """The address that every client picks for a key; adding or removing one moves only that one's share of keys."""
    return max(addresses, key=lambda address: hashlib.sha256(f"{address}|{key}".encode()).digest())
