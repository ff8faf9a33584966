"""What the services' metrics and the kernel say while load is on."""

import asyncio
import contextlib
import os
import re
import time
import urllib.request
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from prometheus_client.parser import text_string_to_metric_families

from bench.load.annotators import KINDS, Kind
from bench.replicas import More
from splitsam.client.stack import ServiceName, Stack

SERVICES: dict[Kind, ServiceName] = {"encode": "encoder", "click": "decoder"}
_PAUSE_S = 0.5
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass
class Watched:
    """Of one service during a time.

    Args:
        fill: work units in a batch, on average; None without batches.
        queue_ms: wait for a batch, and before for a thread that decodes, on average; None without batches.
        rss_mib: most memory resident, of the samples, of all its processes.
    """

    fill: float | None = None
    queue_ms: float | None = None
    rss_mib: float = 0.0
    samples: list[float] = field(default_factory=list)


@contextlib.asynccontextmanager
async def watching(stack: Stack, more: More | None = None) -> AsyncIterator[dict[Kind, Watched]]:
    """Watch both services inside the `with`; the figures are complete after it.

    Args:
        more: processes beside the stack's own.
    """
    replicas: More = more or {}
    urls: dict[Kind, list[str]] = {kind: [stack.metrics_url(service)] for kind, service in SERVICES.items()}
    pids: dict[Kind, list[int]] = {kind: [stack.children[service].pid] for kind, service in SERVICES.items()}
    for kind, service in SERVICES.items():
        urls[kind] += [replica.metrics_url for replica in replicas.get(service, ())]
        pids[kind] += [replica.pid for replica in replicas.get(service, ())]
    seen = {kind: Watched() for kind in KINDS}
    before = {kind: _scrape(urls[kind]) for kind in KINDS}
    sampling = asyncio.create_task(_sample(pids, seen))
    try:
        yield seen
    finally:
        sampling.cancel()
        await asyncio.gather(sampling, return_exceptions=True)
    for kind, watched in seen.items():
        batches, work, waits, wait_s = _scrape(urls[kind]) - before[kind]
        watched.fill = work / batches if batches else None
        watched.queue_ms = 1000 * wait_s / waits if waits else None
        watched.rss_mib = max(watched.samples)


def resident_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(found[1]) / 1024 if found else 0.0


def cpu_seconds(pid: int, *, main_thread: bool = False) -> float:
    """What a process, or its main thread alone, has used of all cores since its start."""
    folder = Path(f"/proc/{pid}/task/{pid}" if main_thread else f"/proc/{pid}")
    fields = (folder / "stat").read_text().rpartition(")")[2].split()
    user, system = fields[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def with_children(pid: int) -> list[int]:
    """A process and those that it has started and that still run."""
    started = (thread / "children" for thread in Path(f"/proc/{pid}/task").iterdir())
    return [pid, *(int(child) for children in started for child in children.read_text().split())]


async def busy_cores(start_s: float, seconds: float) -> float:
    """Of the machine, whoever keeps them busy, on average from `start_s` of time.monotonic() on."""
    await asyncio.sleep(start_s - time.monotonic())
    before_s = _busy_s()
    await asyncio.sleep(start_s + seconds - time.monotonic())
    return (_busy_s() - before_s) / seconds


def _busy_s() -> float:
    """What all processes have used of all cores since the machine's start; the kernel's own work included."""
    user, nice, system, _idle, _io_wait, irq, soft_irq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + soft_irq) / os.sysconf("SC_CLK_TCK")


async def _sample(pids: dict[Kind, list[int]], seen: dict[Kind, Watched]) -> None:
    while True:
        for kind, watched in seen.items():
            watched.samples.append(sum(map(resident_mib, pids[kind])))
        await asyncio.sleep(_PAUSE_S)


def _scrape(urls: Sequence[str]) -> npt.NDArray[np.float64]:
    """Batches, work in them, waits for them, seconds of those; of all processes since their starts."""
    return np.sum([_scrape_one(url) for url in urls], axis=0)


def _scrape_one(url: str) -> list[float]:
    with _OPENER.open(url, timeout=30) as response:
        families = text_string_to_metric_families(response.read().decode())
    found: defaultdict[str, float] = defaultdict(float)
    for sample in (sample for family in families for sample in family.samples):
        is_first_wait = sample.name.endswith("_count") and sample.labels.get("batcher") == "prepare"
        if "le" not in sample.labels and not is_first_wait:  # its seconds belong to the image's wait for the model
            found[sample.name] += sample.value
    names = ("batch_fill_count", "batch_fill_sum", "queue_seconds_count", "queue_seconds_sum")
    return [found[f"splitsam_{name}"] for name in names]
