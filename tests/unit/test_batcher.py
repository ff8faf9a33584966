"""Batches: how they form, in which order they are served, who is refused, and that everybody gets an answer."""

import asyncio
import itertools
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence

import pytest

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


async def test_an_item_whose_deadline_passed_in_the_queue_is_refused_and_never_run(
    start, model: Model, metrics: Metrics
):
    batcher = start()
    busy, *late = await submit_behind(batcher, model, 1, 2, left_s=0)
    in_time = await queue(batcher, 3)
    model.let_go()
    for task in late:
        with pytest.raises(DeadlineTooShort) as caught:
            await task
        assert caught.value.retry_delay_s > 0
    assert await values([busy, *in_time]) == [0, 6]
    assert model.batches == [[0], [3]]
    assert dropped(metrics, "expired") == 2


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
