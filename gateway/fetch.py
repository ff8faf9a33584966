"""Fetches images for tools that send addresses: from listed hosts, of bounded size, in bounded time.

Whoever may call the gateway could otherwise have it call anything that it can reach. So every hop is checked by name
against the list, and by address as the connection is opened; a token goes to Label Studio's own origin alone, and
never across a redirect.
"""

import asyncio
import json
import ssl
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urljoin

import httpcore

from splitsam.gateway.addresses import AllowedHosts, BadAddress, CheckedBackend, Target, parse_target
from splitsam.gateway.errors import GatewayError, too_large
from splitsam.gateway.metrics import GatewayMetrics
from splitsam.gateway.settings import GatewaySettings

_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 3
# Stores that know nothing of a file's kind send the last two.
_KINDS = ("image/", "application/octet-stream", "binary/octet-stream")
_MAX_ANSWER_BYTES = 2**16
_HEADERS = {"accept": "*/*", "accept-encoding": "identity", "user-agent": "splitsam-gateway"}

Result = TypeVar("Result")


class Fetcher:
    """Fetches over connections that are opened for one fetch each.

    Raises:
        SettingsProblem: the file of authorities cannot be used.
    """

    def __init__(self, settings: GatewaySettings, metrics: GatewayMetrics):
        self._hosts = AllowedHosts(settings.image_hosts)
        self._allow_private = settings.private_images
        self._max_bytes = settings.max_image_bytes
        self._timeout_s = settings.fetch_timeout_ms / 1000
        self._trusted = settings.label_studio_origin
        self._tls = settings.fetch_tls()
        self._metrics = metrics

    async def image(self, url: str, authorization: str | None = None) -> bytes:
        """The bytes of an image.

        Args:
            url: http:// or https://.
            authorization: sent to Label Studio's origin if that is where the address begins.

        Raises:
            GatewayError: it could not be had; the message says why, for whoever labels.
        """
        try:
            content = await self.get(url, authorization, self._max_bytes, _KINDS)
        except GatewayError as error:
            self._metrics.fetches.labels(error.reason).inc()
            raise
        self._metrics.fetches.labels("OK").inc()
        return content

    async def get(self, url: str, authorization: str | None, max_bytes: int, kinds: tuple[str, ...]) -> bytes:
        """The bytes at an address, of one of these media types; for errors see `image`."""
        return await self._in_time(self._follow(url, authorization, max_bytes, kinds))

    async def post_json(self, url: str, message: Mapping[str, str]) -> Any:
        """What Label Studio answers to a message; no other host is sent any."""
        target = parse_target(url)
        if target.origin != self._trusted:
            raise BadAddress("is not Label Studio's")
        headers = _HEADERS | {"content-type": "application/json"}
        exchange = _Exchange(headers, True, _MAX_ANSWER_BYTES, ("application/json",), json.dumps(message).encode())
        answer = await self._in_time(self._once(target, exchange))
        return json.loads(answer) if isinstance(answer, bytes) else {}

    async def _in_time(self, fetching: Coroutine[Any, Any, Result]) -> Result:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await fetching
        except BadAddress as error:
            raise GatewayError(400, "IMAGE_ADDRESS_REFUSED", f"The image's address {error}.") from error
        except TimeoutError as error:
            raise _not_fetched(f"its host did not send it within {self._timeout_s:g} s") from error
        except (httpcore.NetworkError, httpcore.TimeoutException) as error:
            raise _not_fetched("its host cannot be reached") from error
        except (httpcore.ProtocolError, ssl.SSLError) as error:
            raise _not_fetched("its host does not answer as a web server does") from error

    async def _follow(self, url: str, authorization: str | None, max_bytes: int, kinds: tuple[str, ...]) -> bytes:
        target = parse_target(url)
        for _ in range(_MAX_REDIRECTS + 1):
            is_trusted = target.origin == self._trusted
            if not is_trusted:
                self._hosts.check(target)
            headers = dict(_HEADERS)
            if authorization is not None and is_trusted:
                headers["authorization"] = authorization
            authorization = None
            exchange = _Exchange(headers, is_trusted or self._allow_private, max_bytes, kinds)
            answer = await self._once(target, exchange)
            if isinstance(answer, bytes):
                return answer
            further = parse_target(answer)
            if target.scheme == "https" and further.scheme != "https":
                raise BadAddress("leads from https:// to http://")
            target = further
        raise BadAddress(f"leads on more than {_MAX_REDIRECTS} times")

    async def _once(self, target: Target, exchange: "_Exchange") -> bytes | str:
        """The bytes, or the address that the host names instead."""
        url = httpcore.URL(scheme=target.scheme, host=target.host, port=target.port, target=target.path)
        method = "GET" if exchange.content is None else "POST"
        headers = [("host", target.place), *exchange.headers.items()]
        backend = CheckedBackend(exchange.allow_private)
        async with (
            httpcore.AsyncConnectionPool(ssl_context=self._tls, network_backend=backend, keepalive_expiry=0) as pool,
            pool.stream(method, url, headers=headers, content=exchange.content) as response,
        ):
            received = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
            if response.status in _REDIRECTS and "location" in received:
                return urljoin(target.url, received["location"])
            _check(response.status, received, exchange)
            chunks, size = [], 0
            async for chunk in response.aiter_stream():
                size += len(chunk)
                if size > exchange.max_bytes:
                    raise too_large("The image", exchange.max_bytes)
                chunks.append(chunk)
            return b"".join(chunks)


@dataclass(frozen=True)
class _Exchange:
    """One request, and what may come back: bytes of one of these media types."""

    headers: Mapping[str, str]
    allow_private: bool
    max_bytes: int
    kinds: tuple[str, ...]
    content: bytes | None = None


def _check(status: int, headers: Mapping[str, str], exchange: _Exchange) -> None:
    if status in (401, 403):
        raise _not_fetched("its host asks for a login")
    if status != 200:
        raise _not_fetched(f"its host answers with status {status}")
    kind = headers.get("content-type", exchange.kinds[-1]).partition(";")[0].strip().lower()
    if not kind.startswith(exchange.kinds):
        raise _not_fetched(f"there is {kind[:40]!r} at its address")
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > exchange.max_bytes:
        raise too_large("The image", exchange.max_bytes)


def _not_fetched(why: str) -> GatewayError:
    return GatewayError(424, "IMAGE_NOT_FETCHED", f"The image could not be fetched: {why}.")
