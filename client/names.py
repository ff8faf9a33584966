"""The host names among a deployment's addresses, and the replicas that each of them stands for at the moment."""

import ipaddress
import math
import random
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

_FRESH_S = 5.0
JUST_NOW_S = 0.5
# Calls wait no longer than this for the first look-up; gRPC resolves the names then.
_FIRST_WAIT_S = 2.0
# After a long silence the replicas may all be others: a call waits so long, which nobody notices, to hear of it.
_SILENCE_S = 60.0
_SILENCE_WAIT_S = 0.1
_HOST_AND_PORT = re.compile(r"(?P<host>[^:/,@\[\]]+):(?P<port>[0-9]+)")
_SCHEMES = ("dns", "ipv4", "ipv6", "unix", "unix-abstract", "vsock", "xds")


@dataclass(frozen=True)
class Address:
    """Where a server is dialled: as was given, or one of the several replicas that a given name stands for.

    Args:
        place: host:port, or any other target of gRPC.
        name: the host:port that was given for a replica: what its certificate is for; elsewhere empty.
    """

    place: str
    name: str = ""

    def __str__(self) -> str:
        return f"{self.place} ({self.name})" if self.name else self.place


def ip_addresses(host: str) -> list[str]:
    """Those of a name, of one family, so that no server counts twice: IPv4, or IPv6 where it has no other.

    Raises:
        OSError, UnicodeError: there are none, or nobody could be asked.
    """
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    ips = {ipaddress.ip_address(str(entry[4][0])) for entry in found}
    version = min(ip.version for ip in ips)
    return sorted(str(ip) for ip in ips if ip.version == version)


class Names:
    """What each address stands for: a name of several hosts for all of them, anything else for itself.

    Names are looked up on a thread, when somebody asks and the last time is longer ago; the answer is then what was
    known before; only the first, and one after a minute's silence, may be waited for. A name that cannot be looked up
    keeps what it had.

    Args:
        given: addresses. Of the form name:port are resolved; IP addresses, other targets of gRPC (`dns:///name:port`,
            `unix:`) and names that it calls through a proxy are its own.
        resolve: the IP addresses of a host; it may block.
        clock: seconds, monotonic.

    Attributes:
        look_up: done when the last that was begun is, whatever came of it.
        current: every address that is stood for.
    """

    def __init__(
        self,
        given: Iterable[str],
        resolve: Callable[[str], Sequence[str]] = ip_addresses,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._known: dict[str, tuple[Address, ...]] = {text: (Address(text),) for text in given}
        self._names = [text for text in self._known if _is_name(text)]
        self._resolve = resolve
        self._clock = clock
        self._lock = threading.Lock()
        self._looked_s = -math.inf
        self._began_s = -math.inf
        self.current = self._all()
        self.look_up: Future[None] = Future()
        self.look_up.set_result(None)

    def addresses(self, given: Iterable[str]) -> tuple[Address, ...]:
        """Those that these stand for, in the order given; the several of one name in any."""
        found = [self._known[text] for text in given]
        return tuple(dict.fromkeys(address for each in found for address in random.sample(each, len(each))))

    def refresh(self, max_age_s: float = math.inf) -> None:
        """Begin to look the names up if the last time is longer ago, or five seconds."""
        if not self._names:
            return
        with self._lock:
            now_s = self._clock()
            if not self.look_up.done() or now_s - self._looked_s < min(max_age_s, _FRESH_S):
                return
            threading.Thread(target=self._look, name="splitsam-names", daemon=True).start()
            self.look_up = Future()
            self._began_s = now_s

    def patience_s(self, timeout_s: float) -> float:
        """How long a call that has this much time should wait for `look_up`; 0 unless little is known without it."""
        now_s = self._clock()
        if self.look_up.done() or now_s - self._looked_s < _SILENCE_S:
            return 0.0
        wait_s = _SILENCE_WAIT_S if self._looked_s > -math.inf else _FIRST_WAIT_S
        return max(min(timeout_s, self._began_s + wait_s - now_s), 0.0)

    def _look(self) -> None:
        try:
            for text in self._names:
                self._known[text] = self._found(text)
                self.current = self._all()
        finally:
            with self._lock:
                self._looked_s = self._clock()
                self.look_up.set_result(None)

    def _found(self, text: str) -> tuple[Address, ...]:
        host, _, port = text.rpartition(":")
        try:
            ips = self._resolve(host)
        except (OSError, UnicodeError):
            return self._known[text]
        if len(ips) < 2:
            return (Address(text),)
        return tuple(Address(f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}", text) for ip in ips)

    def _all(self) -> frozenset[Address]:
        return frozenset(address for each in self._known.values() for address in each)


def _is_name(text: str) -> bool:
    parts = _HOST_AND_PORT.fullmatch(text)
    if parts is None or (host := parts["host"]) in _SCHEMES or _is_proxied(host):
        return False
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return True
    return False


def _is_proxied(host: str) -> bool:
    """Whether gRPC calls it through a proxy of the environment, which alone may know what its name stands for."""
    proxies = urllib.request.getproxies_environment()
    return bool({"grpc", "https", "http"} & proxies.keys()) and not urllib.request.proxy_bypass(host)
