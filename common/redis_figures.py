"""What Redis says of its own memory, for whoever watches; nothing depends on it."""

import asyncio
import logging

from splitsam.common.cache import RecordCache
from splitsam.common.errors import CacheUnavailable
from splitsam.common.metrics import Metrics

log = logging.getLogger("splitsam.cache")
_PERIOD_S = 15.0


async def watch_redis(cache: RecordCache, metrics: Metrics, period_s: float = _PERIOD_S) -> None:
    """Ask until cancelled, or until it turns out that INFO is not allowed; a Redis that is away is asked again."""
    while True:
        try:
            figures = await cache.measure()
        except CacheUnavailable:
            pass  # the cache has logged it
        except PermissionError:
            log.warning("redis does not let this user ask INFO: its memory is in no metric")
            return
        else:
            metrics.redis_memory_bytes.set(figures.used_bytes)
            metrics.redis_memory_limit_bytes.set(figures.limit_bytes)
            metrics.redis_evicted.set(figures.evicted)
        await asyncio.sleep(period_s)
