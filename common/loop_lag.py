"""How late the event loop is.

Where answering costs the interpreter more than computing costs the device, requests pile up in front of the queue that
admission watches: each step of each of them waits for a turn.
"""

import asyncio

from splitsam.common.errors import QueueFull
from splitsam.common.metrics import Metrics

# A request takes some ten turns of the loop.
MOST_LATE_S = 0.25
_PERIOD_S = 0.05
_SHARE = 0.2
_RETRY_S = 1.0


class LoopLag:
    """Smoothed over about a quarter of a second, so that one long step is not taken for too much work."""

    def __init__(self, metrics: Metrics):
        self._gauge = metrics.loop_lag_seconds
        self._late_s = 0.0

    async def watch(self, ready: asyncio.Event) -> None:
        """Measure until cancelled, but not how late loading makes the loop."""
        await ready.wait()
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + _PERIOD_S
            await asyncio.sleep(_PERIOD_S)
            self._late_s += _SHARE * (loop.time() - due_s - self._late_s)
            self._gauge.set(self._late_s)

    def check(self) -> None:
        """Raises QueueFull while new calls would only make all others later."""
        if self._late_s > MOST_LATE_S:
            message = f"more calls are running than this process can answer; it is {self._late_s:.2f} s behind"
            raise QueueFull(message, retry_delay_s=_RETRY_S)
