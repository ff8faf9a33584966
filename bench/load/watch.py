"""What the services' metrics and the kernel say while load is on."""

import asyncio
import contextlib
import re
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from bench.load.annotators import KINDS, Kind
from splitsam.client.stack import ServiceName, Stack

SERVICES: dict[Kind, ServiceName] = {"encode": "encoder", "click": "decoder"}
_PAUSE_S = 0.5
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass
class Watched:
    """Of one service during a time.

    Args:
        fill: work units in a batch, on average; None without batches.
        queue_ms: wait for a batch, on average; None without batches.
        rss_mib: most memory resident, of the samples.
    """

    fill: float | None = None
    queue_ms: float | None = None
    rss_mib: float = 0.0
    samples: list[float] = field(default_factory=list)


@contextlib.asynccontextmanager
async def watching(stack: Stack) -> AsyncIterator[dict[Kind, Watched]]:
    """Watch both services inside the `with`; the figures are complete after it."""
    seen = {kind: Watched() for kind in KINDS}
    before = {kind: _scrape(stack, kind) for kind in KINDS}
    sampling = asyncio.create_task(_sample(stack, seen))
    try:
        yield seen
    finally:
        sampling.cancel()
        await asyncio.gather(sampling, return_exceptions=True)
    for kind, watched in seen.items():
        after = _scrape(stack, kind)
        batches, work, waits, wait_s = (now - then for now, then in zip(after, before[kind], strict=True))
        watched.fill = work / batches if batches else None
        watched.queue_ms = 1000 * wait_s / waits if waits else None
        watched.rss_mib = max(watched.samples)


def resident_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(found[1]) / 1024 if found else 0.0


async def _sample(stack: Stack, seen: dict[Kind, Watched]) -> None:
    while True:
        for kind, watched in seen.items():
            watched.samples.append(resident_mib(stack.children[SERVICES[kind]].pid))
        await asyncio.sleep(_PAUSE_S)


def _scrape(stack: Stack, kind: Kind) -> tuple[float, float, float, float]:
    """Batches, work in them, waits for them, seconds of those; all since the start."""
    with _OPENER.open(stack.metrics_url(SERVICES[kind]), timeout=30) as response:
        families = text_string_to_metric_families(response.read().decode())
    found = {sample.name: sample.value for family in families for sample in family.samples if "le" not in sample.labels}
    names = ("batch_fill_count", "batch_fill_sum", "queue_seconds_count", "queue_seconds_sum")
    batches, work, waits, wait_s = (found.get(f"splitsam_{name}", 0.0) for name in names)
    return batches, work, waits, wait_s
