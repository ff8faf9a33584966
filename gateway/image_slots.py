"""Room for images in memory: so many at once, and whoever finds no room in time is told to come again."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import Request

from splitsam.gateway.errors import GatewayError
from splitsam.gateway.settings import GatewaySettings

_FULL = "Too many images are being opened at the same time; try again in a moment."
_RETRY_S = 1.0


class ImageSlots:
    """Taken by whoever has an image in memory, from before its first byte is here until it is let go."""

    def __init__(self, settings: GatewaySettings):
        self._free = asyncio.Semaphore(settings.max_images_in_work)
        self._wait_s = settings.image_wait_ms / 1000

    @contextlib.asynccontextmanager
    async def one(self, unread: Request | None = None) -> AsyncIterator[None]:
        """A slot until the block ends.

        Args:
            unread: a request whose body is read inside. Where there is no slot its bytes are dropped as they come: a
                caller that still sends hears no answer.

        Raises:
            GatewayError: none was free in time.
        """
        try:
            async with asyncio.timeout(self._wait_s):
                await self._free.acquire()
        except TimeoutError as error:
            if unread is not None:
                async for _ in unread.stream():
                    pass
            raise GatewayError(503, "QUEUE_FULL", _FULL, retry_after_s=_RETRY_S) from error
        try:
            yield
        finally:
            self._free.release()
