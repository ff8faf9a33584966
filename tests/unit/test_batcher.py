"""Batches: how they form, in which order they are served, who is refused, and that everybody gets an answer."""

import asyncio
import functools
import itertools
import math
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from types import SimpleNamespace

import pytest

from splitsam.common import admission
from splitsam.common import batcher as batcher_module
from splitsam.common.batcher import Batcher, Lane, Served
from splitsam.common.errors import DeadlineTooShort, NotReady, QueueFull
from splitsam.common.metrics import Metrics

FOREVER_MS = 3_600_000


class Model:
    """Answers each item with its double; a held batch waits until it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.failure: Callable[[Sequence[int]], None] = lambda items: None
        self._held = False
        self._started = threading.Semaphore(0)
        self._go = threading.Event()

    def __call__(self, items: Sequence[int]) -> list[int | Exception]:
        self.batches.append(list(items))
        self._started.release()
        if self._held:
            self._go.wait()
        self.failure(items)
        return [2 * item for item in items]

    def hold(self) -> None:
        self._held = True

    def let_go(self) -> None:
        self._held = False
        self._go.set()

    async def batch_started(self) -> None:
        await asyncio.to_thread(self._started.acquire)


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
async def start(model: Model, metrics: Metrics) -> AsyncIterator[Callable[..., Batcher[int, int]]]:
    """Starts a batcher in front of the model; closed when the test ends, nothing of it left running."""
    batchers: list[Batcher[int, int]] = []

    def make(**settings) -> Batcher[int, int]:
        defaults = {"name": "test", "max_weight": 4, "max_wait_ms": 0, "max_queue": 100, "metrics": metrics}
        batchers.append(Batcher(model, **(defaults | settings)))
        batchers[-1].start()
        return batchers[-1]

    yield make
    model.let_go()
    for batcher in batchers:
        await batcher.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    for batcher in batchers:
        assert len(batcher) == 0


def submit(
    batcher: Batcher[int, int], *items: int, lane: Lane = Lane.CLICK, left_s: float = 3600.0
) -> list[asyncio.Task[Served[int]]]:
    deadline_s = time.monotonic() + left_s
    return [asyncio.create_task(batcher.submit(item, deadline_s=deadline_s, lane=lane)) for item in items]


async def submit_behind(
    batcher: Batcher[int, int], model: Model, *items: int, lane: Lane = Lane.CLICK, left_s: float = 3600.0
) -> list[asyncio.Task[Served[int]]]:
    """Queue items while the model is busy with item 0, the first task."""
    model.hold()
    busy = submit(batcher, 0)
    await model.batch_started()
    return busy + await queue(batcher, *items, lane=lane, left_s=left_s)


async def queue(batcher: Batcher[int, int], *items: int, **how) -> list[asyncio.Task[Served[int]]]:
    tasks = submit(batcher, *items, **how)
    await asyncio.sleep(0)  # every task has reached the queue
    return tasks


async def values(tasks: Sequence[asyncio.Task[Served[int]]]) -> list[int]:
    return [served.value for served in await asyncio.gather(*tasks)]


def dropped(metrics: Metrics, why: str) -> float:
    return metrics.registry.get_sample_value("splitsam_dropped_total", {"batcher": "test", "why": why}) or 0.0


async def test_a_lone_item_is_served_at_once(start, model: Model):
    assert await values(submit(start(), 21)) == [42]
    assert model.batches == [[21]]


async def test_items_that_arrive_while_the_model_is_busy_share_a_batch(start, model: Model):
    batcher = start()
    tasks = await submit_behind(batcher, model, 1, 2, 3)
    model.let_go()
    assert await values(tasks) == [0, 2, 4, 6]
    assert model.batches == [[0], [1, 2, 3]]


async def test_a_batch_holds_no_more_than_its_weight(start, model: Model):
    batcher = start(max_weight=4, weigh=lambda item: item)
    tasks = await submit_behind(batcher, model, 1, 2, 2, 1, 4, 3)
    model.let_go()
    assert await values(tasks) == [0, 2, 4, 4, 2, 8, 6]
    assert model.batches == [[0], [1, 2], [2, 1], [4], [3]]


async def test_an_item_heavier_than_a_batch_runs_alone(start, model: Model):
    batcher = start(max_weight=4, weigh=lambda item: item)
    tasks = await submit_behind(batcher, model, 1, 9, 1)
    model.let_go()
    assert await values(tasks) == [0, 2, 18, 2]
    assert model.batches == [[0], [1], [9], [1]]


async def test_clicks_are_served_before_bulk_that_came_earlier(start, model: Model):
    batcher = start(max_weight=2)
    tasks = await submit_behind(batcher, model, 10, 11, 12, lane=Lane.BULK)
    tasks += await queue(batcher, 1, 2, 3)
    model.let_go()
    assert await values(tasks) == [0, 20, 22, 24, 2, 4, 6]
    assert model.batches == [[0], [1, 2], [3, 10], [11, 12]]


async def test_an_idle_worker_waits_until_a_batch_is_full(start, model: Model):
    batcher = start(max_weight=3, max_wait_ms=FOREVER_MS)
    first, second = await queue(batcher, 1, 2)
    third = submit(batcher, 3)
    assert await values([first, second, *third]) == [2, 4, 6]
    assert model.batches == [[1, 2, 3]]


async def test_an_unfilled_batch_leaves_when_its_wait_is_over(start, model: Model):
    assert await values(submit(start(max_wait_ms=1), 1)) == [2]


async def test_closing_serves_a_batch_that_is_held_back(start, model: Model):
    batcher = start(max_weight=3, max_wait_ms=FOREVER_MS)
    tasks = await queue(batcher, 1, 2)
    await batcher.close()
    assert await values(tasks) == [2, 4]
    assert model.batches == [[1, 2]]


async def test_a_full_queue_refuses_with_a_retry_delay_and_serves_what_it_took(start, model: Model):
    batcher = start(max_queue=2)
    tasks = await submit_behind(batcher, model, 1, 2)
    with pytest.raises(QueueFull) as caught:
        await batcher.submit(3, deadline_s=time.monotonic() + 3600)
    assert caught.value.retry_delay_s > 0
    model.let_go()
    assert await values(tasks) == [0, 2, 4]
    assert await values(submit(batcher, 3)) == [6]


@pytest.mark.parametrize(
    ("left_s", "max_queue_ms", "refusal"), [(0.05, FOREVER_MS, DeadlineTooShort), (3600.0, 50, QueueFull)]
)
async def test_an_item_that_waited_too_long_is_refused_and_never_run(
    start, model: Model, metrics: Metrics, left_s: float, max_queue_ms: float, refusal: type[Exception]
):
    batcher = start(max_queue_ms={Lane.BULK: max_queue_ms})
    busy, *late = await submit_behind(batcher, model, 1, 2, left_s=left_s, lane=Lane.BULK)
    await asyncio.sleep(0.06)
    in_time = await queue(batcher, 3)
    model.let_go()
    for task in late:
        with pytest.raises(refusal) as caught:
            await task
        assert caught.value.retry_delay_s > 0
    assert await values([busy, *in_time]) == [0, 6]
    assert model.batches == [[0], [3]]
    assert dropped(metrics, "expired") == 2


class Steady:
    """Work whose batches take a base and a part for each unit, by a clock that the test moves."""

    def __init__(self, metrics: Metrics, monkeypatch: pytest.MonkeyPatch, base_s: float, unit_s: float, **settings):
        self.now_s = 1000.0
        self.batches: list[list[int]] = []
        self.base_s, self.unit_s = base_s, unit_s
        clock = SimpleNamespace(monotonic=lambda: self.now_s)
        for module in (batcher_module, admission):
            monkeypatch.setattr(module, "time", clock)
        defaults = {"name": "test", "max_weight": 4, "max_wait_ms": 0, "max_queue": 100, "metrics": metrics}
        self.batcher = Batcher(self._run, **(defaults | settings))
        self.go = threading.Event()
        self.go.set()
        self.started = threading.Semaphore(0)

    def _run(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        self.started.release()
        self.go.wait()
        self.now_s += self.base_s + self.unit_s * len(items)
        return list(items)

    async def learn(self) -> None:
        self.batcher.start()
        for size in (1, 2, 3, 4) * 3:
            await asyncio.gather(*(self.submit(0) for _ in range(size)))
        self.batches.clear()

    async def occupy(self, *waiting: int, **how) -> list[asyncio.Task[Served[int]]]:
        """Put the worker to work on item 0 and queue others."""
        while self.started.acquire(blocking=False):
            pass
        self.go.clear()
        first = self.submit(0)
        await asyncio.to_thread(self.started.acquire)
        tasks = [first, *(self.submit(item, **how) for item in waiting)]
        await asyncio.sleep(0)
        return tasks

    def submit(
        self, item: int, left_s: float = 3600.0, lane: Lane = Lane.CLICK, tenant: str = ""
    ) -> asyncio.Task[Served[int]]:
        submitted = self.batcher.submit(item, deadline_s=self.now_s + left_s, lane=lane, tenant=tenant)
        return asyncio.create_task(submitted)


@pytest.fixture
async def steady(metrics: Metrics, monkeypatch: pytest.MonkeyPatch):
    """A worker that has learned: 60 ms, and 10 ms for each of at most 4 items, so 100 ms for a full batch."""
    made: list[Steady] = []

    async def make(**settings) -> Steady:
        made.append(Steady(metrics, monkeypatch, 0.06, 0.01, **settings))
        await made[-1].learn()
        return made[-1]

    yield make
    for each in made:
        each.go.set()
        await each.batcher.close()


async def test_a_deadline_that_the_queue_ahead_leaves_no_time_for_is_refused_at_once(steady):
    work = await steady()
    tasks = await work.occupy(*range(1, 9))  # 70 ms of the running batch, two full ones, then its own: 340 ms
    with pytest.raises(DeadlineTooShort) as caught:
        await work.submit(9, left_s=0.33)
    assert caught.value.retry_delay_s == pytest.approx(0.05)
    with pytest.raises(DeadlineTooShort) as caught:
        await work.submit(9, left_s=0.1)
    assert caught.value.retry_delay_s == pytest.approx(0.24)
    in_time = work.submit(9, left_s=0.35)
    work.go.set()
    await asyncio.gather(*tasks, in_time)
    assert work.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9]]


async def test_an_idle_worker_is_given_what_looks_too_long(steady):
    """Or a first batch that happened to be slow would be the last."""
    work = await steady()
    assert (await work.submit(5, left_s=0.001)).value == 5


async def test_more_work_than_may_wait_is_refused_at_once_and_says_when_to_return(steady):
    work = await steady(max_queue_ms={Lane.CLICK: 300})
    tasks = await work.occupy(*range(1, 9))  # the next starts in 270 ms, more than 0.8 of what is allowed
    with pytest.raises(QueueFull) as caught:
        await work.submit(9)
    assert caught.value.retry_delay_s == pytest.approx(0.27)
    bulk = work.submit(10, lane=Lane.BULK)
    await asyncio.sleep(0)
    assert len(work.batcher) == 9
    work.go.set()
    await asyncio.gather(*tasks, bulk)


async def test_room_is_checked_as_submitting_would_without_taking_any(steady):
    work = await steady(max_queue_ms={Lane.CLICK: 300})
    check = functools.partial(work.batcher.check_room, lane=Lane.CLICK, tenant="")
    check(weight=10_000)
    tasks = await work.occupy(1, 2, 3, 4)
    for _ in range(100):
        check()
    check(deadline_s=work.now_s + 0.25)  # 70 ms of the running batch, a full one, then its own 70 ms
    with pytest.raises(DeadlineTooShort):
        check(deadline_s=work.now_s + 0.23)
    with pytest.raises(DeadlineTooShort):
        check(deadline_s=work.now_s + 0.35, weight=12)
    check(deadline_s=work.now_s + 0.5, weight=12)
    with pytest.raises(QueueFull):
        check(ahead=4)
    assert len(work.batcher) == 4
    work.go.set()
    await asyncio.gather(*tasks)


async def test_work_that_has_begun_goes_on_in_a_full_queue_until_its_deadline(steady):
    work = await steady(max_queue=5, max_queue_ms={Lane.CLICK: 300})
    tasks = await work.occupy(*range(1, 6))
    with pytest.raises(QueueFull):
        await work.submit(6)
    going_on = work.batcher.submit(7, deadline_s=work.now_s + 3600, begun=True)
    expired = work.batcher.submit(8, deadline_s=work.now_s + 0.01, begun=True)
    going_on, expired = asyncio.create_task(going_on), asyncio.create_task(expired)
    await asyncio.sleep(0)
    work.go.set()
    with pytest.raises(DeadlineTooShort):
        await expired
    assert (await going_on).value == 7
    await asyncio.gather(*tasks)


async def test_whoever_waited_too_long_after_all_is_refused_and_not_run(steady):
    work = await steady(max_queue_ms={Lane.CLICK: 400}, max_weight=1)
    busy, *late = await work.occupy(*range(1, 5))  # by what was learned the last would start in 280 ms
    work.base_s = 1.0
    work.go.set()
    await busy
    outcomes = await asyncio.gather(*late, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {QueueFull}
    assert work.batches == [[0]]
    assert (await work.submit(9)).value == 9


async def test_clicks_take_the_places_of_bulk_work_in_a_full_queue(steady, metrics: Metrics):
    work = await steady(max_queue=4)
    busy, first, second, *last = await work.occupy(1, 2, 3, 4, lane=Lane.BULK)
    with pytest.raises(QueueFull):
        await work.submit(9, lane=Lane.BULK)
    clicks = [work.submit(item) for item in (5, 6)]
    for shed in last:
        with pytest.raises(QueueFull) as caught:
            await shed
        assert caught.value.retry_delay_s > 0
    work.go.set()
    await asyncio.gather(busy, first, second, *clicks)
    assert work.batches == [[0], [5, 6, 1, 2]]
    assert dropped(metrics, "shed") == 2


async def test_a_tenants_flood_fills_the_queue_for_that_tenant_only(steady):
    work = await steady(max_queue_ms={Lane.CLICK: 1000}, max_weight=1)
    flood = await work.occupy(*range(1, 10), tenant="a")
    flood += [work.submit(item, tenant="a") for item in range(10, 30)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFull):
        await flood[-1]
    small = [work.submit(1000 + item, tenant="b") for item in range(3)]
    await asyncio.sleep(0)
    work.go.set()
    outcomes = await asyncio.gather(*flood, return_exceptions=True)
    assert [served.value for served in await asyncio.gather(*small)] == [1000, 1001, 1002]
    assert work.batches[1:6] == [[1], [1000], [2], [1001], [3]]
    served = [outcome for outcome in outcomes if isinstance(outcome, Served)]
    assert all(outcome.queue_ms <= 1000 for outcome in served)
    assert len(served) > 5


async def test_a_promoted_item_is_served_before_other_bulk_work(start, model: Model):
    batcher = start(max_weight=1)
    busy, *bulk = await submit_behind(batcher, model, 1, 2, 1003, 4, lane=Lane.BULK)
    click = await queue(batcher, 5)
    batcher.promote(1003, Lane.CLICK)
    batcher.promote(1003, Lane.CLICK)
    batcher.promote(99, Lane.CLICK)
    model.let_go()
    assert await values([busy, *bulk, *click]) == [0, 2, 4, 2006, 8, 10]
    assert model.batches == [[0], [5], [1003], [1], [2], [4]]


async def test_an_item_is_not_put_into_a_later_lane(start, model: Model):
    batcher = start(max_weight=1)
    tasks = await submit_behind(batcher, model, 1)
    tasks += await queue(batcher, 2, lane=Lane.BULK)
    batcher.promote(1, Lane.BULK)
    model.let_go()
    await values(tasks)
    assert model.batches == [[0], [1], [2]]


async def test_a_promoted_item_is_not_shed_with_bulk_work(steady, metrics: Metrics):
    work = await steady(max_queue=4)
    busy, first, second, third, last = await work.occupy(1, 2, 3, 4, lane=Lane.BULK)
    work.batcher.promote(4, Lane.CLICK)
    clicks = [work.submit(item) for item in (5, 6)]
    for shed in (second, third):
        with pytest.raises(QueueFull):
            await shed
    work.go.set()
    await asyncio.gather(busy, first, last, *clicks)
    assert work.batches == [[0], [4, 5, 6, 1]]
    assert dropped(metrics, "shed") == 2


@pytest.mark.parametrize(("waited_s", "is_late"), [(0.25, False), (0.35, True)])
async def test_a_promoted_item_waits_no_longer_than_its_new_lane_allows_from_then(steady, waited_s, is_late):
    work = await steady(max_queue_ms={Lane.CLICK: 300, Lane.BULK: 10_000})
    busy, bulk = await work.occupy(1, lane=Lane.BULK)
    work.now_s += 5
    work.batcher.promote(1, Lane.CLICK)
    work.now_s += waited_s - 0.07  # the batch in work takes 70 ms more
    work.go.set()
    await busy
    [outcome] = await asyncio.gather(bulk, return_exceptions=True)
    assert isinstance(outcome, QueueFull if is_late else Served)


async def test_what_was_waited_before_counts_towards_the_longest_wait(steady):
    work = await steady(max_queue_ms={Lane.CLICK: 300})
    [busy] = await work.occupy()
    submit_now = functools.partial(work.batcher.submit, deadline_s=work.now_s + 3600)
    long, short = (asyncio.create_task(submit_now(item, waited_s=waited_s)) for item, waited_s in ((1, 0.25), (2, 0.2)))
    await asyncio.sleep(0)
    work.go.set()
    await busy  # 70 ms
    with pytest.raises(QueueFull):
        await long
    assert (await short).value == 2


async def test_as_many_threads_as_asked_for_work_side_by_side(metrics: Metrics):
    meeting = threading.Barrier(4)  # of three items in work and the test

    def run(items: Sequence[int]) -> Sequence[int]:
        meeting.wait(60)
        return items

    batcher = Batcher(run, name="test", max_weight=1, max_wait_ms=0, max_queue=9, metrics=metrics, threads=3)
    batcher.start()
    waiting = submit(batcher, *range(6))
    for _ in range(2):
        await asyncio.to_thread(meeting.wait, 60)
    assert await values(waiting) == list(range(6))
    await batcher.close()


async def test_threads_side_by_side_each_take_their_time(metrics: Metrics, monkeypatch: pytest.MonkeyPatch):
    clock = SimpleNamespace(now_s=1000.0)
    clock.monotonic = lambda: clock.now_s
    for module in (batcher_module, admission):
        monkeypatch.setattr(module, "time", clock)
    meeting = threading.Barrier(3)  # of two items in work and the test

    def run(items: Sequence[int]) -> Sequence[int]:
        meeting.wait(60)
        meeting.wait(60)
        return items

    async def meet() -> None:
        await asyncio.to_thread(meeting.wait, 60)

    batcher = Batcher(run, name="test", max_weight=1, max_wait_ms=0, max_queue=9, metrics=metrics, threads=2)
    batcher.start()
    check = functools.partial(batcher.check_room, lane=Lane.CLICK, tenant="")
    for _ in range(2):
        tasks = [asyncio.create_task(batcher.submit(item, deadline_s=math.inf)) for item in range(2)]
        await meet()
        if clock.now_s > 1000:  # 8 s each were learned: the first of the two ends after 8 s, then the newcomer's own
            check(deadline_s=clock.now_s + 16.1)
            with pytest.raises(DeadlineTooShort):
                check(deadline_s=clock.now_s + 15.9)
        clock.now_s += 8
        await meet()
        await asyncio.gather(*tasks)
    await batcher.close()


async def test_a_cancelled_item_is_dropped_counted_and_never_run(start, model: Model, metrics: Metrics):
    batcher = start()
    busy, gone, stays = await submit_behind(batcher, model, 1, 2)
    gone.cancel()
    model.let_go()
    assert await values([busy, stays]) == [0, 4]
    assert gone.cancelled()
    assert model.batches == [[0], [2]]
    assert dropped(metrics, "cancelled") == 1


async def test_cancelled_items_do_not_keep_others_out_of_a_full_queue(start, model: Model, metrics: Metrics):
    batcher = start(max_queue=2)
    busy, gone, stays = await submit_behind(batcher, model, 1, 2)
    gone.cancel()
    newcomer = await queue(batcher, 3)
    model.let_go()
    assert await values([busy, stays, *newcomer]) == [0, 4, 6]
    assert dropped(metrics, "cancelled") == 1


async def test_a_queue_that_empties_while_the_model_is_busy_does_not_end_the_worker(start, model: Model):
    batcher = start(max_queue=1, max_wait_ms=1)
    busy, gone = await submit_behind(batcher, model, 1)
    gone.cancel()
    [late] = submit(batcher, 2, left_s=-1)  # finds the queue full, drops who has gone, and is refused all the same
    with pytest.raises(DeadlineTooShort):
        await late
    assert len(batcher) == 0
    model.let_go()
    assert await values([busy]) == [0]
    assert await values(submit(batcher, 3)) == [6]


async def test_an_item_cancelled_while_it_runs_leaves_its_batch_mates_their_results(start, model: Model):
    batcher = start(max_weight=2)
    busy = await submit_behind(batcher, model)
    busy[0].cancel()
    others = await queue(batcher, 1, 2)
    model.let_go()
    assert await values(others) == [2, 4]
    assert busy[0].cancelled()


@pytest.mark.parametrize("poison", range(1, 8))
async def test_a_poison_item_fails_alone(start, model: Model, poison: int):
    def fail(items: Sequence[int]) -> None:
        if poison in items:
            raise ValueError(f"batch {items}")

    model.failure = fail
    batcher = start(max_weight=8)
    tasks = await submit_behind(batcher, model, *range(1, 8))
    model.let_go()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(outcomes[poison], ValueError)
    assert [o.value for i, o in enumerate(outcomes) if i != poison] == [2 * i for i in range(8) if i != poison]
    assert await values(submit(batcher, 9)) == [18]


async def test_an_exception_among_the_results_is_its_own_items_answer(start, model: Model, metrics: Metrics):
    def divide(items: Sequence[int]) -> list[int | Exception]:
        return [12 // item if item else ZeroDivisionError() for item in items]

    batcher = Batcher(divide, name="test", max_weight=4, max_wait_ms=FOREVER_MS, max_queue=9, metrics=metrics)
    batcher.start()
    outcomes = await asyncio.gather(*submit(batcher, 1, 0, 2, 3), return_exceptions=True)
    await batcher.close()
    assert isinstance(outcomes.pop(1), ZeroDivisionError)
    assert [outcome.value for outcome in outcomes] == [12, 6, 4]


async def test_a_model_on_the_event_loop_lets_others_run_and_is_halved_as_well(metrics: Metrics):
    running, sizes = asyncio.Event(), []

    async def divide(items: Sequence[int]) -> list[int]:
        sizes.append(len(items))
        running.set()
        await asyncio.sleep(0.01)
        return [12 // item for item in items]

    batcher = Batcher(divide, name="test", max_weight=4, max_wait_ms=FOREVER_MS, max_queue=9, metrics=metrics)
    batcher.start()
    waiting = asyncio.gather(*submit(batcher, 1, 0, 2, 3), return_exceptions=True)
    await running.wait()
    assert not waiting.done()
    outcomes = await waiting
    await batcher.close()
    assert isinstance(outcomes.pop(1), ZeroDivisionError)
    assert [outcome.value for outcome in outcomes] == [12, 6, 4]
    assert sizes == [4, 2, 1, 1, 2]


async def test_as_many_batches_are_in_work_as_are_allowed(metrics: Metrics):
    begun, may_end = [], asyncio.Event()

    async def run(items: Sequence[int]) -> Sequence[int]:
        begun.append(list(items))
        await may_end.wait()
        return items

    batcher = Batcher(run, name="test", max_weight=2, max_wait_ms=0, max_queue=9, metrics=metrics, at_once=2)
    batcher.start()
    waiting = asyncio.gather(*submit(batcher, 1, 2, 3, 4, 5, 6))
    for _ in range(20):
        await asyncio.sleep(0)
    assert begun == [[1, 2], [3, 4]]
    closing = asyncio.create_task(batcher.close())
    await asyncio.sleep(0)
    assert not closing.done()
    may_end.set()
    assert [served.value for served in await waiting] == [1, 2, 3, 4, 5, 6]
    await closing
    assert begun == [[1, 2], [3, 4], [5, 6]]


async def test_batches_that_end_together_leave_an_idle_worker(metrics: Metrics):
    may_end = asyncio.Event()

    async def run(items: Sequence[int]) -> Sequence[int]:
        await may_end.wait()
        return items

    batcher = Batcher(run, name="test", max_weight=1, max_wait_ms=0, max_queue=9, metrics=metrics, at_once=2)
    batcher.start()
    tasks = await queue(batcher, 1, 2)
    for _ in range(20):
        await asyncio.sleep(0)  # both are in work
    now_s = time.monotonic()
    with pytest.raises(DeadlineTooShort):
        batcher.check_room(lane=Lane.CLICK, tenant="", deadline_s=now_s)
    may_end.set()
    assert await values(tasks) == [1, 2]
    batcher.check_room(lane=Lane.CLICK, tenant="", deadline_s=now_s)  # an idle worker takes anything
    await batcher.close()


async def test_a_model_that_loses_results_fails_every_item_and_the_next_batch_is_served(metrics: Metrics):
    batcher = Batcher(lambda items: items[1:], name="test", max_weight=2, max_wait_ms=0, max_queue=9, metrics=metrics)
    batcher.start()
    for _ in range(2):
        outcomes = await asyncio.gather(*submit(batcher, 1, 2), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [RuntimeError, RuntimeError]
    await batcher.close()


async def test_closing_serves_what_was_accepted_and_refuses_the_rest(start, model: Model):
    batcher = start(max_weight=1)
    tasks = await submit_behind(batcher, model, 1, 2, 3)
    closing = asyncio.create_task(batcher.close())
    await asyncio.sleep(0)
    with pytest.raises(NotReady) as caught:
        await batcher.submit(4, deadline_s=time.monotonic() + 3600)
    assert caught.value.retry_delay_s
    assert not closing.done()
    model.let_go()
    await closing
    assert await values(tasks) == [0, 2, 4, 6]


async def test_closing_an_idle_batcher_returns(start):
    batcher = start()
    await batcher.close()
    assert len(batcher) == 0


async def test_the_metrics_tell_of_batches_and_an_emptied_queue(start, model: Model, metrics: Metrics):
    batcher = start(max_weight=3)
    tasks = await submit_behind(batcher, model, 1, 2, 3, 4)
    sample = metrics.registry.get_sample_value
    assert sample("splitsam_queue_length", {"batcher": "test"}) == 4
    model.let_go()
    await values(tasks)
    assert sample("splitsam_queue_length", {"batcher": "test"}) == 0
    assert sample("splitsam_batch_fill_count", {"batcher": "test"}) == 3
    assert sample("splitsam_batch_fill_sum", {"batcher": "test"}) == 5
    assert sample("splitsam_model_seconds_count", {"batcher": "test"}) == 3


async def test_no_caller_is_forgotten_when_many_come_fail_and_leave(start, model: Model):
    chance = random.Random(5)

    def fail(items: Sequence[int]) -> None:
        if any(item % 17 == 0 for item in items):
            raise ValueError("poison")

    model.failure = fail
    batcher = start(max_queue=20)
    tasks: list[asyncio.Task[Served[int]]] = []
    for item in itertools.islice(itertools.count(1), 400):
        tasks += submit(batcher, item, lane=chance.choice(list(Lane)), left_s=chance.choice([0, 3600, 3600]))
        if chance.random() < 0.1:
            chance.choice(tasks).cancel()
        if chance.random() < 0.2:
            await asyncio.sleep(0)
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    for item, outcome in enumerate(outcomes, start=1):
        if isinstance(outcome, Served):
            assert outcome.value == 2 * item
        else:
            allowed = (QueueFull, DeadlineTooShort, asyncio.CancelledError)
            assert isinstance(outcome, (*allowed, ValueError) if item % 17 == 0 else allowed)
    assert any(isinstance(outcome, Served) for outcome in outcomes)
    assert all(len(batch) <= 4 for batch in model.batches)
