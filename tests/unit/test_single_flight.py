"""One computation for many callers: shared results, shared failures, and cancellation that hurts nobody else."""

import asyncio
import gc

import pytest

from splitsam.common.single_flight import SingleFlight


class Computation:
    """Counts its starts and waits to be let go."""

    def __init__(self) -> None:
        self.starts = 0
        self.cancels = 0
        self.started = asyncio.Event()
        self.release = asyncio.Event()
        self.failure: Exception | None = None

    async def __call__(self) -> str:
        self.starts += 1
        self.started.set()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancels += 1
            raise
        if self.failure is not None:
            raise self.failure
        return f"result {self.starts}"


async def join(flights: SingleFlight[str, str], compute: Computation, callers: int, key: str = "key"):
    """Callers that wait for the key, the computation under way."""
    tasks = [asyncio.create_task(flights.run(key, compute)) for _ in range(callers)]
    await compute.started.wait()
    await asyncio.sleep(0)  # the callers behind the first have joined
    return tasks


async def test_callers_of_the_same_key_share_one_computation():
    flights, compute = SingleFlight[str, str](), Computation()
    tasks = await join(flights, compute, 5)
    compute.release.set()
    assert await asyncio.gather(*tasks) == ["result 1"] * 5
    assert (compute.starts, len(flights)) == (1, 0)


async def test_callers_of_different_keys_do_not_wait_for_each_other():
    flights, held, free = SingleFlight[str, str](), Computation(), Computation()
    (waiting,) = await join(flights, held, 1, "held")
    free.release.set()
    assert await flights.run("free", free) == "result 1"
    assert not waiting.done()
    held.release.set()
    await waiting


async def test_a_later_caller_starts_anew():
    flights, compute = SingleFlight[str, str](), Computation()
    compute.release.set()
    assert await flights.run("key", compute) == "result 1"
    assert await flights.run("key", compute) == "result 2"


async def test_every_caller_gets_the_failure_and_the_next_one_a_new_try():
    flights, compute = SingleFlight[str, str](), Computation()
    compute.failure = ValueError("no")
    tasks = await join(flights, compute, 3)
    compute.release.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ValueError] * 3
    compute.failure = None
    assert await flights.run("key", compute) == "result 2"


async def test_a_cancelled_caller_leaves_the_others_their_result():
    flights, compute = SingleFlight[str, str](), Computation()
    first, second = await join(flights, compute, 2)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    compute.release.set()
    assert await second == "result 1"
    assert compute.cancels == 0


async def test_the_computation_is_cancelled_when_the_last_caller_leaves():
    flights, compute = SingleFlight[str, str](), Computation()
    tasks = await join(flights, compute, 2)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await asyncio.sleep(0)
    assert (compute.cancels, len(flights)) == (1, 0)


async def test_a_newcomer_never_joins_a_computation_that_is_being_cancelled():
    flights, compute = SingleFlight[str, str](), Computation()
    (only,) = await join(flights, compute, 1)
    only.cancel()
    newcomer = asyncio.create_task(flights.run("key", compute))
    compute.release.set()
    assert await newcomer == "result 2"
    assert only.cancelled()


async def test_a_failure_that_nobody_waits_for_is_not_reported_by_the_loop():
    reports: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: reports.append(context))
    flights = SingleFlight[str, str]()
    started, release = asyncio.Event(), asyncio.Event()

    async def fail_when_cancelled() -> str:
        started.set()
        try:
            await release.wait()
        finally:
            raise ValueError("while being cancelled")

    task = asyncio.create_task(flights.run("key", fail_when_cancelled))
    await started.wait()
    task.cancel()
    await asyncio.wait([task])
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    del task
    gc.collect()
    assert reports == []
