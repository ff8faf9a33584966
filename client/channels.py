"""The channels of a client: one for each address, replaced when the server at its other end is not the right one."""

import threading
import time
from collections.abc import Iterable, Set
from typing import Any

from splitsam.client.connection import Connection
from splitsam.client.errors import SplitsamError
from splitsam.client.names import Address

# Where connections are balanced, another server is asked second: refused again, there is but one.
_REFUSALS = 2
# Those who find out together that their connection leads nowhere leave it once.
_JUST_NOW_S = 1.0


class Line:
    """A channel to an address, how many calls are on it, and how many in a row were refused by a server that goes."""

    def __init__(self, address: Address, channel: Any) -> None:
        self.address = address
        self.channel = channel
        self.calls = 0
        self._refusals = 0
        self._opened_s = time.monotonic()

    def is_useless_after(self, error: SplitsamError | None) -> bool:
        """Count a call that ended, with this error if it failed; whether later ones should go elsewhere."""
        self._refusals = self._refusals + 1 if error is not None and error.is_of_a_server_that_goes else 0
        return self._refusals >= _REFUSALS

    @property
    def is_new(self) -> bool:
        """Whether it was opened just now."""
        return time.monotonic() - self._opened_s < _JUST_NOW_S


class Channels:
    """For calls on any thread: `begin` one, make it on the line's channel, and `end` it in any case.

    Args:
        addresses: whose channels are opened at once, so that a missing certificate shows; others are when first called.
    """

    def __init__(self, where: Connection, addresses: Set[Address]) -> None:
        self._where = where
        self._lock = threading.Lock()
        self._lines = {address: Line(address, where.open_channel(address)) for address in addresses}
        self._left: set[Line] = set()  # with calls on them

    def close(self) -> None:
        with self._lock:
            lines = [*self._lines.values(), *self._left]
        _close(lines)

    def begin(self, address: Address) -> Line:
        with self._lock:
            line = self._lines.get(address)
            if line is None:
                line = self._lines[address] = Line(address, self._where.open_channel(address))
            line.calls += 1
            return line

    def end(self, line: Line, error: SplitsamError | None) -> None:
        """The call has ended, with this error if it failed.

        A connection whose server goes is left: later calls get another one, which leads to another server where the
        address balances connections. Calls on the old one end in peace.
        """
        with self._lock:
            line.calls -= 1
            if line.is_useless_after(error) and self._lines.get(line.address) is line:
                self._replace(line)
            over = self._take_over()
        _close(over)

    def leave(self) -> None:
        """All of them, as when their servers go; a connection that was opened just now is kept."""
        with self._lock:
            for line in list(self._lines.values()):
                if not line.is_new:
                    self._replace(line)
            over = self._take_over()
        _close(over)

    def keep(self, addresses: Set[Address]) -> None:
        """Close those to other addresses as soon as no call is on them."""
        with self._lock:
            self._left.update(self._lines.pop(address) for address in self._lines.keys() - addresses)
            over = self._take_over()
        _close(over)

    def _replace(self, line: Line) -> None:
        self._left.add(line)
        channel = self._where.open_channel(line.address, has_own_connection=True)
        self._lines[line.address] = Line(line.address, channel)

    def _take_over(self) -> list[Line]:
        over = [line for line in self._left if line.calls == 0]
        self._left.difference_update(over)
        return over


def _close(lines: Iterable[Line]) -> None:
    for line in lines:
        line.channel.close()
