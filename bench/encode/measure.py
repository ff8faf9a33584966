"""Clients on a running stack, and what its processes do meanwhile."""

import asyncio
import multiprocessing
import time
from dataclasses import dataclass

import redis

from bench.encode.clients import Crew, send_images
from bench.encode.rows import Usage
from bench.load.crowd import Outcome
from bench.load.watch import cpu_seconds, resident_mib, watching, with_children
from bench.replicas import More
from bench.spread import START_S, spread
from splitsam.client.stack import Stack

_MIB = 2**20
_REDIS_TIMEOUT_S = 10.0
# That clients go on sending, so that nothing is idle or gone when the measured time ends.
_AFTERWARDS_S = 1.0


async def measure(
    stack: Stack, more: More, image: bytes, clients: int, generators: int, seconds: float
) -> tuple[list[Outcome], Usage]:
    """Have clients send images: first to warm up, for START_S less what their processes take to start, then measured.

    Args:
        more: encoders beside the stack's own.
        generators: processes that the clients are spread over.

    Returns:
        What became of all calls, those before and after the measured time included, and what the processes did in it.

    Raises:
        RuntimeError: as `send_images`.
    """
    shares = [len(range(number, clients, generators)) for number in range(generators)]
    encoders = (stack.encoder, *(encoder.address for encoder in more["encoder"]))
    crews = [Crew(encoders, image, share, seconds + _AFTERWARDS_S) for share in shares if share]
    start_s = time.monotonic() + START_S
    sending = asyncio.create_task(spread(send_images, crews, start_s))
    await _wait_until(start_s, sending)
    async with watching(stack, more) as watched:
        before = _read_counters(stack, more)
        await _wait_until(start_s + seconds, sending)
        after = _read_counters(stack, more)
    return await sending, _describe_usage(before, after, watched["encode"].fill)


@dataclass(frozen=True)
class _Counters:
    """Since their start, at a moment of time.monotonic(); memory as it is then."""

    at_s: float
    encoder_s: float
    redis_s: float
    clients_s: float
    sets: int
    received_bytes: int
    encoder_mib: float
    redis_mib: float


def _read_counters(stack: Stack, more: More) -> _Counters:
    services = (stack.children["encoder"].pid, *(encoder.pid for encoder in more["encoder"]))
    encoders = [pid for service in services for pid in with_children(service)]
    with redis.Redis.from_url(stack.redis_url, socket_timeout=_REDIS_TIMEOUT_S) as connection:
        sets = connection.info("commandstats").get("cmdstat_set", {}).get("calls", 0)
        received_bytes = connection.info("stats")["total_net_input_bytes"]
    return _Counters(
        at_s=time.monotonic(),
        encoder_s=sum(map(cpu_seconds, encoders)),
        redis_s=cpu_seconds(stack.children["redis"].pid),
        clients_s=sum(cpu_seconds(child.pid) for child in multiprocessing.active_children() if child.pid),
        sets=sets,
        received_bytes=received_bytes,
        encoder_mib=sum(map(resident_mib, encoders)),
        redis_mib=resident_mib(stack.children["redis"].pid),
    )


def _describe_usage(before: _Counters, after: _Counters, fill: float | None) -> Usage:
    seconds = after.at_s - before.at_s
    return Usage(
        fill=fill,
        encoder_cores=(after.encoder_s - before.encoder_s) / seconds,
        redis_cores=(after.redis_s - before.redis_s) / seconds,
        clients_cores=(after.clients_s - before.clients_s) / seconds,
        redis_sets_s=(after.sets - before.sets) / seconds,
        redis_mib_s=(after.received_bytes - before.received_bytes) / _MIB / seconds,
        encoder_mib_first=before.encoder_mib,
        encoder_mib_last=after.encoder_mib,
        redis_mib_first=before.redis_mib,
        redis_mib_last=after.redis_mib,
    )


async def _wait_until(moment_s: float, sending: asyncio.Task[list[Outcome]]) -> None:
    """Wait for a moment of time.monotonic(); raises at once what ends the clients before it."""
    await asyncio.wait([sending], timeout=max(0.0, moment_s - time.monotonic()))
    if sending.done():
        sending.result()
