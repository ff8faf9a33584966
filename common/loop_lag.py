"""How late the event loop is, for whoever watches: where answering costs the interpreter more than computing costs the
device, calls wait for turns of the loop, and no queue of ours shows it."""

import asyncio

from splitsam.common.metrics import Metrics

_PERIOD_S = 0.05
_SHARE = 0.2


async def watch_loop_lag(metrics: Metrics, ready: asyncio.Event) -> None:
    """Measure until cancelled, smoothed over about a quarter of a second; not how late loading makes the loop."""
    await ready.wait()
    loop, late_s = asyncio.get_running_loop(), 0.0
    while True:
        due_s = loop.time() + _PERIOD_S
        await asyncio.sleep(_PERIOD_S)
        late_s += _SHARE * (loop.time() - due_s - late_s)
        metrics.loop_lag_seconds.set(late_s)
