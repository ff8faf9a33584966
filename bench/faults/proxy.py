"""A TCP proxy in front of Redis that damages what comes back, on a thread of its own."""

import asyncio
import contextlib
import random
import threading
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

_IDLE_S = 0.005  # silence after which what has come is taken for a whole reply
_CHUNK_BYTES = 2**20
_HOLD_S = 0.3


class Proxy:
    """As a context manager; `damage` names what happens to replies until it is changed.

    Args:
        target: host and port.
        seed: of what is random.
    """

    def __init__(self, target: tuple[str, int], seed: int = 1):
        self._target = target
        self._random = random.Random(seed)
        self._damage: Callable[[bytes, asyncio.StreamWriter], Awaitable[None]] = self.nothing
        self._held: tuple[bytes, asyncio.StreamWriter, asyncio.Future[bytes]] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.damaged = 0

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        started = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop)
        self._server = started.result(10)
        self.address: tuple[str, int] = self._server.sockets[0].getsockname()[:2]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def set(self, damage: str) -> None:
        """`nothing`, `delay`, `reset`, `truncate`, `flip` or `swap`."""
        self._damage = getattr(self, damage)

    async def nothing(self, reply: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(reply)

    async def delay(self, reply: bytes, writer: asyncio.StreamWriter) -> None:
        """Late by up to two seconds, more than the services wait."""
        await asyncio.sleep(self._random.uniform(0.0, 2.0))
        self.damaged += 1
        writer.write(reply)

    async def reset(self, reply: bytes, writer: asyncio.StreamWriter) -> None:
        """Every other reply is a closed connection."""
        if self._spares():
            writer.write(reply)
        else:
            writer.transport.abort()

    async def truncate(self, reply: bytes, writer: asyncio.StreamWriter) -> None:
        """Every other reply ends early, and the connection with it."""
        if self._spares():
            writer.write(reply)
        else:
            writer.write(reply[: self._random.randrange(len(reply))])
            writer.close()

    async def flip(self, reply: bytes, writer: asyncio.StreamWriter) -> None:
        """A few bits of every other reply, half the time where its length is written."""
        if self._spares():
            writer.write(reply)
            return
        damaged = bytearray(reply)
        for _ in range(3):
            end = min(len(reply), 12) if self._random.random() < 0.5 else len(reply)
            damaged[self._random.randrange(end)] ^= 1 << self._random.randrange(8)
        writer.write(bytes(damaged))

    async def swap(self, reply: bytes, writer: asyncio.StreamWriter) -> None:
        """Two connections get each other's replies; one that finds no partner in time is let through."""
        # One that has waited long enough is done for, though it may not have noticed yet.
        if self._held is not None and self._held[1] is not writer and not self._held[2].done():
            other, _, waiting = self._held
            self._held = None
            self.damaged += 1
            waiting.set_result(reply)
            writer.write(other)
            return
        waiting = self._loop.create_future()
        self._held = mine = (reply, writer, waiting)
        try:
            writer.write(await asyncio.wait_for(waiting, _HOLD_S))
        except TimeoutError:
            writer.write(reply)
        finally:
            if self._held is mine:
                self._held = None

    def _spares(self) -> bool:
        if self._random.random() < 0.5:
            return True
        self.damaged += 1
        return False

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            upstream, downstream = await asyncio.open_connection(*self._target, limit=_CHUNK_BYTES)
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(_forward(reader, downstream))
                    group.create_task(self._answer(upstream, writer))
            except* (OSError, _Closed):
                pass
            finally:
                downstream.close()
        writer.close()

    async def _answer(self, upstream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            reply = await upstream.read(_CHUNK_BYTES)
            while reply:
                try:
                    async with asyncio.timeout(_IDLE_S):
                        more = await upstream.read(_CHUNK_BYTES)
                except TimeoutError:
                    break
                if not more:
                    break
                reply += more
            if not reply:
                raise _Closed
            await self._damage(reply, writer)
            await writer.drain()

    async def _stop(self) -> None:
        self._server.close()
        # Once is not enough: `wait_for` of Python 3.11 loses a cancellation that comes together with its result.
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks, timeout=0.1)


class _Closed(Exception):
    """One side has closed its connection."""


async def _forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(_CHUNK_BYTES):
        writer.write(chunk)
        await writer.drain()
    raise _Closed
