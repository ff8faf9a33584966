"""Work spread over processes, because one that sends many requests a second would be late with its own."""

import asyncio
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

# To start a process, open its connections and have its first image encoded.
START_S = 20.0
Share = TypeVar("Share")
Result = TypeVar("Result")


async def spread(
    work: Callable[[int, Share, float], Sequence[Result]], shares: Sequence[Share], start_s: float
) -> list[Result]:
    """Give each share to a process of its own; the results of all, in the order of the shares.

    Args:
        work: of the number of the process, from 1 on, its share, and `start_s`; spawned processes have to find it.
        start_s: when all begin, in seconds of time.monotonic(); START_S from now leaves them time to get ready.
    """
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(len(shares), multiprocessing.get_context("spawn")) as pool:
        working = [loop.run_in_executor(pool, work, n, share, start_s) for n, share in enumerate(shares, start=1)]
        return [result for results in await asyncio.gather(*working) for result in results]


def check_in_time(number: int, start_s: float) -> None:
    """Raises RuntimeError when a process got ready too late to begin with the others."""
    if time.monotonic() > start_s:
        raise RuntimeError(f"process {number} was not ready in {START_S:g} s")
