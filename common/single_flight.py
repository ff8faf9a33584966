"""One computation per key at a time, however many callers ask for it."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


class SingleFlight(Generic[Key, Result]):
    """Callers of the same key share one task; it is cancelled when the last of them stops waiting."""

    def __init__(self) -> None:
        self._flights: dict[Key, tuple[asyncio.Task[Result], list[None]]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def __contains__(self, key: object) -> bool:
        return key in self._flights

    async def run(self, key: Key, start: Callable[[], Awaitable[Result]]) -> Result:
        """The result of the key's running task, or of a new one made by `start`."""
        if key not in self._flights:
            task = asyncio.ensure_future(_awaited(start))
            self._flights[key] = (task, [])
            task.add_done_callback(lambda done: self._forget(key, done))
        task, waiters = self._flights[key]
        waiters.append(None)
        try:
            return await asyncio.shield(task)
        finally:
            waiters.pop()
            if not waiters and not task.done():
                self._forget(key, task)  # a newcomer must not join a task that is being cancelled
                task.cancel()

    def _forget(self, key: Key, task: "asyncio.Task[Result]") -> None:
        if key in self._flights and self._flights[key][0] is task:
            del self._flights[key]
        if task.done() and not task.cancelled():
            task.exception()  # every waiter may have left: the failure is theirs, not the loop's to report


async def _awaited(start: Callable[[], Awaitable[Result]]) -> Result:
    return await start()
