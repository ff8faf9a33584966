"""The channels of a synchronous client: one for each address, replaced when the server at its other end goes."""

import threading
from typing import Any

from splitsam.client.connection import Connection
from splitsam.client.errors import SplitsamError

# Of a name that stands for several servers, another one is asked second: refused again, there is but one.
REFUSALS = 2


class Line:
    """A channel to an address, how many calls are on it, and how many in a row were refused by a server that goes."""

    def __init__(self, address: str, channel: Any) -> None:
        self.address = address
        self.channel = channel
        self.calls = 0
        self.refusals = 0


class Channels:
    """For calls on any thread: `begin` one, make it on the line's channel, and `end` it in any case."""

    def __init__(self, where: Connection) -> None:
        self._where = where
        self._lock = threading.Lock()
        addresses = {*where.encoders, *where.decoders}
        self._lines = {address: Line(address, where.open_channel(address)) for address in addresses}
        self._left: set[Line] = set()

    def close(self) -> None:
        with self._lock:
            lines = [*self._lines.values(), *self._left]
        for line in lines:
            line.channel.close()

    def begin(self, address: str) -> Line:
        with self._lock:
            line = self._lines[address]
            line.calls += 1
            return line

    def end(self, line: Line, error: SplitsamError | None) -> None:
        """The call has ended, with this error if it failed.

        A connection whose server goes is left: later calls get another one, which leads to another server where the
        address balances connections. Calls on the old one end in peace.
        """
        with self._lock:
            line.calls -= 1
            line.refusals = line.refusals + 1 if error is not None and error.is_of_a_server_that_goes else 0
            if line.refusals >= REFUSALS and self._lines[line.address] is line:
                self._left.add(line)
                channel = self._where.open_channel(line.address, has_own_connection=True)
                self._lines[line.address] = Line(line.address, channel)
            is_over = line in self._left and line.calls == 0
            if is_over:
                self._left.remove(line)
        if is_over:
            line.channel.close()
