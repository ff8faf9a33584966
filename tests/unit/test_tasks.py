"""Several coroutines as one: all results, or the first failure and nothing left running."""

import asyncio

import pytest

from splitsam.common.tasks import gather_or_cancel


async def answer(value):
    await asyncio.sleep(0)
    return value


async def fail(problem):
    await asyncio.sleep(0)
    raise problem


@pytest.mark.parametrize("count", [0, 1, 2, 5])
async def test_results_come_in_order(count):
    assert await gather_or_cancel(answer(number) for number in range(count)) == list(range(count))


@pytest.mark.parametrize("others", [0, 3])
async def test_the_first_failure_is_raised_and_the_rest_is_cancelled(others):
    cancelled = []

    async def wait():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    with pytest.raises(KeyError):
        await gather_or_cancel([fail(KeyError()), *(wait() for _ in range(others))])
    assert len(cancelled) == others
