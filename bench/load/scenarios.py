"""The runs: a steady crowd, or an overload with what was before and comes after."""

import asyncio
import math
import statistics
import time
import zlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace

from bench.calls import make_different
from bench.load.annotators import KINDS, Habits, Kind, annotators_for, plan_crowd
from bench.load.crowd import Crowd, Place
from bench.load.generators import play
from bench.load.rows import Environment, Phase, Row, summarise
from bench.load.watch import busy_cores, watching
from bench.replicas import More
from bench.spread import START_S
from splitsam.client.stack import Stack

# Of the capacity, what counts as no load.
_UNLOADED_SHARE = 0.2


@dataclass(frozen=True)
class Run:
    """A crowd in front of a stack.

    Args:
        more: processes beside the stack's own.
        generators: processes of the crowd.
        bound_ms: `max_queue_ms` of the service behind each kind of request.
        seed: of everybody's schedule.
    """

    stack: Stack
    more: More
    place: Place
    generators: int
    habits: Habits
    bound_ms: Mapping[Kind, int]
    environment: Environment
    seed: int = 0

    async def play(self, phase: Phase, unloaded: dict[str, Row] | None = None) -> list[Row]:
        """Perform a phase; a row for each kind of request."""
        events = plan_crowd(phase.annotators, self.habits, phase.seconds, f"{self.seed} {phase.name}")
        # Its own images: those of the phase before are in the cache.
        images = make_different(self.place.image, zlib.crc32(phase.name.encode()), 0)
        async with watching(self.stack, self.more) as watched:
            start_s = time.monotonic() + START_S
            playing = play(replace(self.place, image=images), events, self.generators, start_s)
            outcomes, busy = await asyncio.gather(playing, busy_cores(start_s, phase.seconds))
        return [
            summarise(
                phase,
                kind,
                [outcome for outcome in outcomes if outcome.kind == kind],
                watched[kind],
                self.bound_ms[kind],
                self.environment,
                busy,
                unloaded[kind].ms_p99 if unloaded and phase.name == "recovery" else None,
            )
            for kind in KINDS
        ]


async def run_steady(run: Run, annotators: int, seconds: float, searches: int = 0) -> AsyncIterator[Row]:
    """A crowd of a given size; then again, with so many searches in everything mode going on beside it."""
    for row in await run.play(Phase("steady", "steady", seconds, annotators)):
        yield row
    if searches:
        async with Crowd(run.place) as crowd, crowd.searching(searches) as took_s:
            for row in await run.play(Phase("steady", "everything mode beside it", seconds, annotators)):
                yield row
            print(f"{len(took_s)} images searched meanwhile, {statistics.median(took_s or [math.nan]):.3f} s each")


async def run_overload(run: Run, factor: float, seconds: float, calm_seconds: float) -> AsyncIterator[Row]:
    """Times the capacity, then a fifth of it, then a multiple, then the fifth again.

    Args:
        factor: of the capacity.
        seconds: of the overload.
        calm_seconds: of each other phase.
    """
    async with Crowd(run.place) as crowd:
        capacity = await crowd.measure_capacity(run.habits, calm_seconds / 2)
    calm = annotators_for(_UNLOADED_SHARE * capacity, run.habits)
    many = annotators_for(factor * capacity, run.habits)
    phases = (("unloaded", calm, calm_seconds), ("overload", many, seconds), ("recovery", calm, calm_seconds))
    unloaded: dict[str, Row] = {}
    for name, annotators, duration in phases:
        for row in await run.play(Phase("overload", name, duration, annotators), unloaded):
            if name == "unloaded":
                unloaded[row.kind] = row
            yield row
