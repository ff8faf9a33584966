"""Many callers' work in one model call: a bounded, fair queue in front of one worker, or of several.

submit:
    refuse at once what would wait too long by the batches measured so far, and what the queue has no place for
    when a newcomer is due before others, refuse the last of those that it leaves without time or place
loop:
    wait until an entry is queued; if the batch is not full, wait up to max_wait for more
    take entries, clicks before bulk and tenants in turn, up to max_weight; drop the cancelled, refuse the expired
    run the batch; if it fails, halve it until the culprit is alone
    give every entry its own result or error, an internal one where anything else than the model fails
"""

import asyncio
import functools
import inspect
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Generic, TypeVar, cast

from splitsam.common import tracing
from splitsam.common.admission import Admission
from splitsam.common.batch_entries import Entry, Served, answer, answering
from splitsam.common.errors import NotReady, QueueFull
from splitsam.common.fair_queue import FairQueue, Lane, Place
from splitsam.common.metrics import Metrics
from splitsam.common.priority import lower_priority

__all__ = ["Batcher", "Lane", "Served"]

log = logging.getLogger("splitsam.batcher")

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Collects entries of concurrent callers into batches.

    Args:
        run: takes the batch's items and returns one result, or one exception, for each: blocking, on a thread of the
            batcher's own, or a coroutine function on the event loop.
        max_weight: work units in a batch; a single heavier entry runs alone.
        max_wait_ms: how long an idle worker holds an unfilled batch back; 0 never does.
        max_queue: entries that may wait.
        max_queue_ms: by lane, the longest wait of an entry; without one only its deadline ends it.
        weigh: work units of an item.
        niceness: of the thread that runs batches, as of `lower_priority`.
        at_once: batches in work, for a `run` on the event loop: the device computes on one, the next is on its way.
        threads: that run batches side by side, for a blocking `run`.
        called: a batch's name in traces where it is no model's, and so not in the metrics of models.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Sequence[Result | Exception]]
        | Callable[[Sequence[Item]], Awaitable[Sequence[Result | Exception]]],
        *,
        name: str,
        max_weight: int,
        max_wait_ms: float,
        max_queue: int,
        metrics: Metrics,
        max_queue_ms: Mapping[Lane, float] | None = None,
        weigh: Callable[[Item], int] = lambda _item: 1,
        niceness: int = 0,
        at_once: int = 1,
        threads: int = 1,
        called: str | None = None,
    ):
        self._name = name
        self._called = called or f"{name} model"
        self._is_model = called is None
        self._max_weight = max_weight
        self._max_wait_s = max_wait_ms / 1000
        self._metrics = metrics
        self._weigh = weigh
        self._queue: FairQueue[Entry[Item, Result]] = FairQueue()
        self._admission = Admission(
            self._queue,
            max_weight=max_weight,
            max_queue=max_queue,
            max_queue_ms=max_queue_ms or {},
            workers=threads,
        )
        self._arrival = asyncio.Event()
        self._closing = False
        self._threads = ThreadPoolExecutor(
            threads, f"splitsam-{name}", initializer=lower_priority, initargs=(niceness,)
        )
        awaited = run if inspect.iscoroutinefunction(run) else functools.partial(self._run_on_thread, run)
        self._run = cast("Callable[[Sequence[Item]], Awaitable[Sequence[Result | Exception]]]", awaited)
        self._worker: asyncio.Task[None] | None = None
        self._side_by_side = threads > 1
        self._room = asyncio.Semaphore(max(at_once, threads))
        self._serving: set[asyncio.Task[None]] = set()
        self._ended_s = 0.0

    def __len__(self) -> int:
        return len(self._queue)

    def start(self) -> None:
        self._worker = asyncio.create_task(self._work(), name=f"{self._name}-batcher")

    async def close(self) -> None:
        """Serve what is queued, then stop; new entries are refused."""
        self._closing = True
        self._arrival.set()
        if self._worker is not None:
            await self._worker
        self._threads.shutdown()

    async def submit(
        self,
        item: Item,
        *,
        deadline_s: float,
        lane: Lane = Lane.CLICK,
        tenant: str = "",
        begun: bool = False,
        waited_s: float = 0.0,
    ) -> Served[Result]:
        """Wait for an item's result.

        Args:
            deadline_s: when the caller gives up, in seconds of time.monotonic().
            begun: it goes on with work that was admitted before, which no want of room shall waste.
            waited_s: in a queue before this one; the longest wait is that in both.

        Raises:
            QueueFull: too many entries wait, or for too long, or those whose turn is first took the place.
            DeadlineTooShort: the item's turn would come, or came, too late.
            NotReady: the batcher is closing.
        """
        now_s = time.monotonic()
        future: asyncio.Future[Served[Result]] = asyncio.get_running_loop().create_future()
        longest_s = math.inf if begun else self._admission.longest_s[lane]
        request = tracing.current()
        with tracing.step("wait for a batch", {"splitsam.lane": lane.name.lower()}) as waiting:
            entry = Entry(item, now_s, now_s + longest_s - waited_s, deadline_s, future, request, waiting)
            place = self._queue.make_place(entry, lane, tenant, self._weigh(item))
            self._admit(place, deadline_s, begun=begun)
            self._queue.add(place)
            self._shed(place)
            self._metrics.queue_length.labels(self._name).set(len(self))
            self._arrival.set()
            return await future

    def promote(self, item: Item, lane: Lane) -> None:
        """Let an item that waits in a later lane go on in this one, by its order and, from now, its longest wait."""
        for place in self._queue:
            if place.item.item is item and place.lane > lane:
                longest_s = self._admission.longest_s[lane]
                entry = replace(place.item, latest_start_s=time.monotonic() + longest_s)
                entry.waiting.set_attribute("splitsam.lane", lane.name.lower())
                self._shed(self._queue.promote(place, entry, lane))
                return

    def check_room(
        self, *, lane: Lane, tenant: str, deadline_s: float = math.inf, weight: int = 1, ahead: int = 0
    ) -> None:
        """Refuse now what `submit` would refuse, before any work is done for it.

        Args:
            weight: of all that is about to be submitted, a batch at a time.
            ahead: of others' work on its way here that will be served before.

        Raises:
            QueueFull, DeadlineTooShort, NotReady: as `submit` does.
        """
        first = min(weight, self._max_weight)
        place = self._queue.make_place(None, lane, tenant, first)
        self._admit(place, deadline_s, ahead, weight - first)

    def _admit(self, place: Place[Any], deadline_s: float, ahead: int = 0, later: int = 0, begun: bool = False) -> None:
        if self._closing:
            raise NotReady("the service is shutting down", retry_delay_s=1.0)
        if begun:
            return
        refusal = self._admission.find_refusal(place, deadline_s, ahead, later)
        if refusal is not None and self._drop_cancelled():
            refusal = self._admission.find_refusal(place, deadline_s, ahead, later)
        if refusal is not None:
            raise refusal

    def _shed(self, newcomer: Place[Entry[Item, Result]]) -> None:
        """Refuse those due last whom a newcomer leaves without a place, or with too long a wait."""
        while self._queue.last() is not newcomer and self._admission.is_overfull():
            entry = self._queue.drop_last().item
            if not entry.future.done():
                self._metrics.dropped.labels(self._name, "shed").inc()
                message = "others, whose turn is first, have taken the place"
                entry.future.set_exception(QueueFull(message, retry_delay_s=self._admission.retry_s()))

    def _drop_cancelled(self) -> int:
        """Free the places of entries that nobody waits for any more, and say how many."""
        gone = self._queue.remove(lambda entry: entry.future.done())
        self._metrics.dropped.labels(self._name, "cancelled").inc(gone)
        return gone

    async def _work(self) -> None:
        while True:
            self._arrival.clear()
            if not len(self):
                if self._closing:
                    await asyncio.gather(*self._serving)
                    return
                await self._arrival.wait()
                continue
            await self._room.acquire()
            await self._wait_for_more()
            batch: list[Place[Entry[Item, Result]]] = []
            with answering(batch, self._name):
                self._take(batch)
            serving = asyncio.create_task(self._serve([place for place in batch if not place.item.future.done()]))
            self._serving.add(serving)
            serving.add_done_callback(self._end)

    def _end(self, served: asyncio.Task[None]) -> None:
        self._serving.discard(served)
        self._room.release()

    async def _wait_for_more(self) -> None:
        """Hold an unfilled batch back for max_wait at the most, counted from its oldest entry."""
        while len(self) and not self._closing and self._max_wait_s:
            oldest_s = min(place.item.queued_at_s for place in self._queue)
            left_s = oldest_s + self._max_wait_s - time.monotonic()
            if left_s <= 0 or self._queue.weight >= self._max_weight:
                return
            self._arrival.clear()
            try:
                await asyncio.wait_for(self._arrival.wait(), left_s)
            except TimeoutError:
                return

    def _take(self, batch: list[Place[Entry[Item, Result]]]) -> None:
        """Fill the next batch, without entries that nobody waits for any more; what has left the queue is in it."""
        weight = 0
        for lane in Lane:
            while (due := self._queue.first(lane)) and (not batch or weight + due.weight <= self._max_weight):
                batch.append(self._queue.take_first(lane))
                if self._turn_away(due):
                    batch.pop()
                else:
                    weight += due.weight
        self._metrics.queue_length.labels(self._name).set(len(self))

    def _turn_away(self, due: Place[Entry[Item, Result]]) -> bool:
        """Whether an entry whose turn has come is not served: nobody waits for it any more, or it is too late."""
        if due.item.future.done():
            self._metrics.dropped.labels(self._name, "cancelled").inc()
            return True
        late = self._admission.find_lateness(due.lane, due.item.latest_start_s, due.item.deadline_s)
        if late is None:
            return False
        self._metrics.dropped.labels(self._name, "expired").inc()
        due.item.future.set_exception(late)
        return True

    async def _serve(self, batch: list[Place[Entry[Item, Result]]]) -> None:
        if not batch:
            return
        with answering(batch, self._name):
            start_s = time.monotonic()
            entries = [place.item for place in batch]
            weight = sum(place.weight for place in batch)
            if self._is_model:
                self._metrics.batch_fill.labels(self._name).observe(weight)
            for entry in entries:
                entry.waiting.end()
                self._metrics.queue_seconds.labels(self._name).observe(start_s - entry.queued_at_s)
            size = {"splitsam.batch.entries": len(batch), "splitsam.batch.weight": weight}
            spans = tracing.begin_batch(self._called, [entry.request for entry in entries], size)
            self._admission.begin_batch(weight)
            try:
                results = await self._run_isolating([entry.item for entry in entries])
                answer(entries, results, start_s, time.monotonic())  # what fails from here on costs nobody a result
            finally:
                end_s = time.monotonic()
                begun_s = start_s if self._side_by_side else max(start_s, self._ended_s)
                self._admission.end_batch(weight, end_s - begun_s)
                self._ended_s = end_s
            for span, result in zip(spans, results, strict=True):
                if isinstance(result, Exception):
                    tracing.fail(span, result)
                span.end()
            if self._is_model:
                self._metrics.model_seconds.labels(self._name).observe(end_s - start_s)

    async def _run_isolating(self, items: Sequence[Item]) -> list[Result | Exception]:
        """Run a batch; when it fails as a whole, halve it so that only the culprit's caller sees the failure."""
        try:
            results = list(await self._run(items))
            if len(results) != len(items):
                raise RuntimeError(f"the model gave {len(results)} results for {len(items)} items")
            return results
        except Exception as error:  # noqa: BLE001 - whatever an item does to the model is that item's answer
            if len(items) == 1:
                return [error]
            log.warning("a batch failed and is halved", extra={"batch": len(items), "error": repr(error)})
        middle = len(items) // 2
        return await self._run_isolating(items[:middle]) + await self._run_isolating(items[middle:])

    async def _run_on_thread(
        self, run: Callable[[Sequence[Item]], Any], items: Sequence[Item]
    ) -> Sequence[Result | Exception]:
        return await asyncio.get_running_loop().run_in_executor(self._threads, run, items)
