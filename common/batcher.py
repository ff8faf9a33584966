"""Many callers' work in one model call: a bounded queue in front of one worker thread.

loop:
    wait until an entry is queued; if the batch is not full, wait up to max_wait for more
    take entries, clicks before bulk, up to max_weight; drop the cancelled, refuse the expired
    run the batch on the worker thread; if it fails, halve it until the culprit is alone
    give every entry its own result or error
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from typing import Generic, TypeVar

from splitsam.common.errors import DeadlineTooShort, NotReady, QueueFull
from splitsam.common.metrics import Metrics

log = logging.getLogger("splitsam.batcher")

Item = TypeVar("Item")
Result = TypeVar("Result")


class Lane(IntEnum):
    """Which queue an entry waits in; a lower lane is served first."""

    CLICK = 0
    BULK = 1


@dataclass(frozen=True)
class Served(Generic[Result]):
    """A result and where its time went.

    Args:
        queue_ms: from submission to the start of its batch.
        model_ms: the batch it was in.
    """

    value: Result
    queue_ms: float
    model_ms: float


@dataclass(frozen=True)
class _Entry(Generic[Item, Result]):
    item: Item
    weight: int
    queued_at_s: float
    deadline_s: float
    future: "asyncio.Future[Served[Result]]"


class Batcher(Generic[Item, Result]):
    """Collects entries of concurrent callers into batches.

    Args:
        run: blocking; takes the batch's items and returns one result, or one exception, for each.
        max_weight: work units in a batch; a single heavier entry runs alone.
        max_wait_ms: how long an idle worker holds an unfilled batch back; 0 never does.
        max_queue: entries that may wait; more are refused with QueueFull.
        weigh: work units of an item.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Sequence[Result | Exception]],
        *,
        name: str,
        max_weight: int,
        max_wait_ms: float,
        max_queue: int,
        metrics: Metrics,
        weigh: Callable[[Item], int] = lambda _item: 1,
    ):
        self._run = run
        self._name = name
        self._max_weight = max_weight
        self._max_wait_s = max_wait_ms / 1000
        self._max_queue = max_queue
        self._metrics = metrics
        self._weigh = weigh
        self._lanes: tuple[deque[_Entry[Item, Result]], ...] = tuple(deque() for _ in Lane)
        self._arrival = asyncio.Event()
        self._closing = False
        self._last_batch_s = 0.1
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"splitsam-{name}")
        self._worker: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return sum(map(len, self._lanes))

    def start(self) -> None:
        self._worker = asyncio.create_task(self._work(), name=f"{self._name}-batcher")

    async def close(self) -> None:
        """Serve what is queued, then stop; new entries are refused."""
        self._closing = True
        self._arrival.set()
        if self._worker is not None:
            await self._worker
        self._thread.shutdown()

    async def submit(self, item: Item, *, deadline_s: float, lane: Lane = Lane.CLICK) -> Served[Result]:
        """Wait for an item's result.

        Args:
            deadline_s: when the caller gives up, in seconds of time.monotonic().

        Raises:
            QueueFull: too many entries wait.
            DeadlineTooShort: the deadline passed before the item's turn.
            NotReady: the batcher is closing.
        """
        if self._closing:
            raise NotReady("the service is shutting down", retry_delay_s=1.0)
        if len(self) >= self._max_queue:
            self._drop_cancelled()
        if len(self) >= self._max_queue:
            raise QueueFull(f"{self._max_queue} entries are waiting already", retry_delay_s=self._backlog_s())
        future: asyncio.Future[Served[Result]] = asyncio.get_running_loop().create_future()
        self._lanes[lane].append(_Entry(item, self._weigh(item), time.monotonic(), deadline_s, future))
        self._metrics.queue_length.labels(self._name).set(len(self))
        self._arrival.set()
        return await future

    def _drop_cancelled(self) -> None:
        """Free the places of entries that nobody waits for any more."""
        for lane in self._lanes:
            waiting = [entry for entry in lane if not entry.future.done()]
            self._metrics.dropped.labels(self._name, "cancelled").inc(len(lane) - len(waiting))
            lane.clear()
            lane.extend(waiting)

    def _backlog_s(self) -> float:
        """About how long the queue takes to empty, from the last batch's time."""
        waiting = sum(entry.weight for lane in self._lanes for entry in lane)
        return min(30.0, max(0.05, self._last_batch_s * (1 + waiting / self._max_weight)))

    async def _work(self) -> None:
        while True:
            self._arrival.clear()
            if not len(self):
                if self._closing:
                    return
                await self._arrival.wait()
                continue
            await self._wait_for_more()
            await self._serve(self._take())

    async def _wait_for_more(self) -> None:
        """Hold an unfilled batch back for max_wait at the most, counted from its oldest entry."""
        while not self._closing and self._max_wait_s:
            oldest_s = min(lane[0].queued_at_s for lane in self._lanes if lane)
            left_s = oldest_s + self._max_wait_s - time.monotonic()
            if left_s <= 0 or sum(entry.weight for lane in self._lanes for entry in lane) >= self._max_weight:
                return
            self._arrival.clear()
            try:
                await asyncio.wait_for(self._arrival.wait(), left_s)
            except TimeoutError:
                return

    def _take(self) -> list[_Entry[Item, Result]]:
        """The next batch, without entries that nobody waits for any more."""
        batch: list[_Entry[Item, Result]] = []
        weight = 0
        now_s = time.monotonic()
        for lane in self._lanes:
            while lane and (not batch or weight + lane[0].weight <= self._max_weight):
                entry = lane.popleft()
                if entry.future.done():
                    self._metrics.dropped.labels(self._name, "cancelled").inc()
                elif entry.deadline_s <= now_s:
                    self._metrics.dropped.labels(self._name, "expired").inc()
                    message = "the deadline passed while the request waited for a batch"
                    entry.future.set_exception(DeadlineTooShort(message, retry_delay_s=self._backlog_s()))
                else:
                    batch.append(entry)
                    weight += entry.weight
                    self._metrics.queue_seconds.labels(self._name).observe(now_s - entry.queued_at_s)
        self._metrics.queue_length.labels(self._name).set(len(self))
        if batch:
            self._metrics.batch_fill.labels(self._name).observe(weight)
        return batch

    async def _serve(self, batch: list[_Entry[Item, Result]]) -> None:
        if not batch:
            return
        start_s = time.monotonic()
        items = [entry.item for entry in batch]
        results = await asyncio.get_running_loop().run_in_executor(self._thread, self._run_isolating, items)
        self._last_batch_s = time.monotonic() - start_s
        self._metrics.model_seconds.labels(self._name).observe(self._last_batch_s)
        for entry, result in zip(batch, results, strict=True):
            if entry.future.done():
                continue
            if isinstance(result, Exception):
                entry.future.set_exception(result)
            else:
                queue_ms = (start_s - entry.queued_at_s) * 1000
                entry.future.set_result(Served(result, queue_ms, self._last_batch_s * 1000))

    def _run_isolating(self, items: Sequence[Item]) -> list[Result | Exception]:
        """Run a batch; when it fails as a whole, halve it so that only the culprit's caller sees the failure."""
        try:
            results = list(self._run(items))
            if len(results) != len(items):
                raise RuntimeError(f"the model gave {len(results)} results for {len(items)} items")
            return results
        except Exception as error:  # noqa: BLE001 - whatever an item does to the model is that item's answer
            if len(items) == 1:
                return [error]
            log.warning("a batch failed and is halved", extra={"batch": len(items), "error": repr(error)})
        middle = len(items) // 2
        return self._run_isolating(items[:middle]) + self._run_isolating(items[middle:])
