"""A crowd spread over processes, because one that sends many requests a second would be late with its own."""

import asyncio
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

from bench.load.annotators import Event
from bench.load.crowd import Crowd, Outcome, Place

# To start a process, open its connections and have its first image encoded.
_START_S = 10.0


async def play(place: Place, events: Sequence[Event], generators: int) -> list[Outcome]:
    """Send everybody's events; each annotator is of one process, and all processes begin together.

    Args:
        generators: processes, 1 or more.

    Raises:
        RuntimeError: a process was not ready when the schedule began.
    """
    start_s = time.monotonic() + _START_S
    shares = [[event for event in events if event.annotator % generators == number] for number in range(generators)]
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(generators, multiprocessing.get_context("spawn")) as pool:
        playing = [loop.run_in_executor(pool, _play, place, share, start_s, n + 1) for n, share in enumerate(shares)]
        return [outcome for share in await asyncio.gather(*playing) for outcome in share]


def _play(place: Place, events: Sequence[Event], start_s: float, number: int) -> list[Outcome]:
    async def run() -> list[Outcome]:
        async with Crowd(place, number) as crowd:
            if time.monotonic() > start_s:
                raise RuntimeError(f"generator {number} was not ready in {_START_S:g} s")
            return await crowd.run(events, start_s)

    return asyncio.run(run())
