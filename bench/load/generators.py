"""A crowd spread over processes."""

import asyncio
import functools
from collections.abc import Sequence

from bench.load.annotators import Event
from bench.load.crowd import Crowd, Outcome, Place
from bench.spread import check_in_time, spread


async def play(place: Place, events: Sequence[Event], generators: int, start_s: float) -> list[Outcome]:
    """Send everybody's events; each annotator is of one process, and all processes begin together.

    Args:
        generators: processes, 1 or more.
        start_s: as of `spread`.

    Raises:
        RuntimeError: a process was not ready when the schedule began.
    """
    shares = [[event for event in events if event.annotator % generators == number] for number in range(generators)]
    return await spread(functools.partial(_play, place), shares, start_s)


def _play(place: Place, number: int, events: Sequence[Event], start_s: float) -> list[Outcome]:
    async def run() -> list[Outcome]:
        async with Crowd(place, number) as crowd:
            await crowd.connect({event.annotator for event in events})
            check_in_time(number, start_s)
            return await crowd.run(events, start_s)

    return asyncio.run(run())
