"""Bytes of requests in memory, bounded: a call waits for room before its request is read, and not for ever."""

import asyncio
import collections
import contextlib
import heapq
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import TypeVar

from splitsam.common import tracing
from splitsam.common.errors import InvalidArgument, QueueFull, UploadTooSlow
from splitsam.common.metrics import Metrics
from splitsam.common.settings import ServiceSettings

Message = TypeVar("Message")
_RETRY_S = 1.0
# Of a request without image and logits, and of all such together: 256 of them can be on their way at once.
SMALL_REQUEST_BYTES = 2**16
_SMALL_ROOM_BYTES = 2**24


class Uploads:
    """Room for the requests of all calls of a process: that of small ones is their own, for uploads may be slow."""

    def __init__(self, settings: ServiceSettings, metrics: Metrics, large_requests: Collection[str]):
        self._large_requests = large_requests
        self._large = UploadBudget(settings, metrics, settings.max_upload_bytes, settings.max_message_bytes)
        self._small = UploadBudget(settings, metrics, _SMALL_ROOM_BYTES, SMALL_REQUEST_BYTES)

    def of(self, method: str) -> "UploadBudget":
        return self._large if method in self._large_requests else self._small


class UploadBudget:
    """Room for requests, from the first byte read until the answer.

    gRPC says how long a request is only when it has been read, so until then it counts as the largest allowed.
    What callers send before they are read stays in HTTP/2's flow control: little, and on their side.

    Args:
        room_bytes: of all requests.
        largest_bytes: of one; gRPC reads no more than `max_message_bytes`, whatever this is.
    """

    def __init__(self, settings: ServiceSettings, metrics: Metrics, room_bytes: int, largest_bytes: int):
        self._free_bytes = room_bytes
        self._largest_bytes = largest_bytes
        self._wait_s = settings.upload_wait_ms / 1000
        self._read_s = settings.upload_timeout_ms / 1000
        self._max_waiting = settings.max_queue
        self._waiting: collections.deque[tuple[asyncio.Future[None], int]] = collections.deque()
        self._gauge = metrics.upload_bytes

    @contextlib.asynccontextmanager
    async def one(
        self, read: Callable[[], Awaitable[bytes | None]], parse: Callable[[bytes], Message]
    ) -> AsyncIterator[Message]:
        """The one request of a call, with room for it until the block ends.

        Args:
            read: gives the next request, None at the end.

        Raises:
            QueueFull: there was no room in time.
            UploadTooSlow: the request did not arrive in time.
            InvalidArgument: there is none, or a larger one than may be.
        """
        held = self._largest_bytes
        with tracing.step("wait for room"):
            await self._take_in_time(held)
        try:
            with tracing.step("receive request") as span:
                data = await self._in_time(read)
                span.set_attribute("splitsam.request.bytes", len(data))
            self._give(held - len(data))
            held = len(data)
            message = parse(data)
            del data  # the message has a copy of its own
            yield message
        finally:
            self._give(held)

    async def many(
        self, requests: AsyncIterator[bytes], parse: Callable[[bytes], Message], held: list[int]
    ) -> AsyncIterator[Message]:
        """The requests of a stream; none is read before there is room for the last.

        Args:
            held: sizes of those not answered yet, for `answered` and `let_go`.
        """
        async for data in requests:
            await self._take(len(data))  # a stream may lie idle for hours, so nothing is held for what may come
            heapq.heappush(held, len(data))
            message = parse(data)
            del data
            yield message

    def answered(self, held: list[int]) -> None:
        """One request of a stream was answered; which one is not known, so the smallest gives back its room."""
        if held:
            self._give(heapq.heappop(held))

    def let_go(self, held: list[int]) -> None:
        """A stream has ended."""
        self._give(sum(held))
        held.clear()

    async def _in_time(self, read: Callable[[], Awaitable[bytes | None]]) -> bytes:
        try:
            async with asyncio.timeout(self._read_s):
                data = await read()
        except TimeoutError as error:
            raise UploadTooSlow(f"the request did not arrive within {self._read_s:g} s") from error
        if data is None:
            raise InvalidArgument("request", "is missing")
        if len(data) > self._largest_bytes:
            description = f"has {len(data)} bytes; at most {self._largest_bytes} are allowed for this method"
            raise InvalidArgument("request", description)
        return data

    async def _take_in_time(self, size_bytes: int) -> None:
        if self._takes_at_once(size_bytes):
            return
        if len(self._waiting) >= self._max_waiting:
            raise QueueFull(f"{len(self._waiting)} calls wait for room already", retry_delay_s=_RETRY_S)
        try:
            async with asyncio.timeout(self._wait_s):
                await self._take(size_bytes)
        except TimeoutError as error:
            raise QueueFull("too many bytes of requests are in memory already", retry_delay_s=_RETRY_S) from error

    def _takes_at_once(self, size_bytes: int) -> bool:
        """Take room where there is some and nobody waits, which costs neither a future nor a timeout."""
        if self._waiting or size_bytes > self._free_bytes:
            return False
        self._free_bytes -= size_bytes
        self._gauge.inc(size_bytes)
        return True

    async def _take(self, size_bytes: int) -> None:
        if self._takes_at_once(size_bytes):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((turn, size_bytes))
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._give(size_bytes)  # the turn came in the moment of the cancellation
            else:
                self._admit()  # whoever stood behind may fit
            raise

    def _give(self, size_bytes: int) -> None:
        self._free_bytes += size_bytes
        self._gauge.dec(size_bytes)
        self._admit()

    def _admit(self) -> None:
        """In the order of arrival, so that large ones are not overtaken for ever."""
        while self._waiting:
            turn, size_bytes = self._waiting[0]
            if not turn.done() and size_bytes > self._free_bytes:
                return
            self._waiting.popleft()
            if not turn.done():
                self._free_bytes -= size_bytes
                self._gauge.inc(size_bytes)
                turn.set_result(None)
