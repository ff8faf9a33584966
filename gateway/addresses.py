"""Where images may be fetched from: which hosts by name, and which addresses those names may stand for."""

import asyncio
import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

import httpcore

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_PORTS = {"http": 80, "https": 443}
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_SAFE = "/?&=;:@!$'()*+,-._~%[]"


class BadAddress(Exception):
    """The address is none that images are fetched from; the message goes on after "The image's address "."""


@dataclass(frozen=True)
class Target:
    """An HTTP address in parts: what is checked is what is called, since nobody parses it a second time."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def origin(self) -> str:
        return f"{self.scheme}://{self.place}"

    @property
    def place(self) -> str:
        """host:port, the port left out where it is the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.origin}{self.path}"


def parse_target(url: str) -> Target:
    """An address to fetch.

    Raises:
        BadAddress: it is not HTTP, has no host, or names a user.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        ascii_host = host.encode("idna").decode("ascii") if host and not host.isascii() else host
    except ValueError:
        raise BadAddress("cannot be read") from None
    if parts.scheme not in _PORTS or not ascii_host:
        raise BadAddress("does not begin with http:// or https://")
    if parts.username is not None or parts.password is not None:
        raise BadAddress("names a user or a password")
    if not all("!" <= letter <= "~" for letter in ascii_host):
        raise BadAddress("has a host that cannot be read")
    try:
        path = quote(parts.path or "/", safe=_SAFE) + (f"?{quote(parts.query, safe=_SAFE)}" if parts.query else "")
    except UnicodeEncodeError:  # half of a character, as JSON may hold
        raise BadAddress("cannot be read") from None
    return Target(parts.scheme, ascii_host.rstrip("."), port or _PORTS[parts.scheme], path)


@dataclass(frozen=True)
class AllowedHosts:
    """Names that images may be fetched from: `host`, `host:port` or `*.domain`; without a port, only the scheme's."""

    patterns: tuple[str, ...]

    def check(self, target: Target) -> None:
        """Raises BadAddress for a host that is not listed."""
        if not any(self._matches(pattern.lower(), target.place.lower()) for pattern in self.patterns):
            raise BadAddress(f"is on {target.place}, which is not among the hosts that images are fetched from")

    @staticmethod
    def _matches(pattern: str, place: str) -> bool:
        if pattern.startswith("*."):
            return place.endswith(pattern[1:])
        return place == pattern


def is_public(address: Address) -> bool:
    """Whether it is of the internet at large: no network of ours, this machine, its link, or a tunnel to them."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address.sixtofour is not None or address.teredo is not None or address in _NAT64:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


class CheckedBackend(httpcore.AsyncNetworkBackend):
    """Opens connections to addresses that were looked at: a name that changes its mind in between gains nothing.

    Args:
        allow_private: lets through what is not public.
    """

    def __init__(self, allow_private: bool):
        self._allow_private = allow_private
        self._backend = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 (the name and the meaning are httpcore's)
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Raises BadAddress where the name stands for no address that may be called."""
        addresses = await _resolved(host, port)
        allowed = [address for address in addresses if self._allow_private or is_public(address)]
        if not allowed:
            raise BadAddress(f"is on {host}, which is in a private network; private_images would allow that")
        problem: Exception | None = None
        for address in allowed:
            try:
                return await self._backend.connect_tcp(str(address), port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                problem = error
        raise httpcore.ConnectError(str(problem))

    async def connect_unix_socket(self, *_arguments: Any, **_options: Any) -> httpcore.AsyncNetworkStream:
        raise BadAddress("is no address")

    async def sleep(self, seconds: float) -> None:
        await self._backend.sleep(seconds)


async def _resolved(host: str, port: int) -> list[Address]:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise httpcore.ConnectError("the host's name is not known") from error
    names = dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found)
    return [ipaddress.ip_address(name) for name in names]
