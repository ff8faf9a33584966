"""One user's pointer: of the requests that wait, only the newest is worth serving."""

import asyncio
from typing import Generic, TypeVar

Request = TypeVar("Request")


class Newest(Generic[Request]):
    """A place for one waiting request; a newer one takes it from an older."""

    def __init__(self) -> None:
        self._waiting: Request | None = None
        self._ended = False
        self._changed = asyncio.Event()

    def offer(self, request: Request) -> Request | None:
        """Put a request in the place; returns the one it superseded."""
        superseded, self._waiting = self._waiting, request
        self._changed.set()
        return superseded

    def end(self) -> None:
        """No more requests will be offered."""
        self._ended = True
        self._changed.set()

    async def take(self) -> Request | None:
        """The waiting request, or None when none will come any more."""
        while self._waiting is None and not self._ended:
            self._changed.clear()
            await self._changed.wait()
        request, self._waiting = self._waiting, None
        return request
