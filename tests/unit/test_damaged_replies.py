"""A proxy before a real Redis that delays, cuts, damages and swaps its replies: a record is itself or none."""

import asyncio

import pytest
import torch
from redis_process import RedisProcess

from bench.faults.proxy import Proxy
from splitsam.common.cache import RecordCache
from splitsam.common.codecs import FP16
from splitsam.common.errors import CacheUnavailable
from splitsam.common.keys import Address
from splitsam.common.records import LOGITS, SHAPES, RecordHeader, Size

CALLERS, ROUNDS = 4, 40


def header_of(number):
    address = Address(bytes(16), number.to_bytes(32, "big"))
    return RecordHeader(LOGITS, address, "ab" * 32, FP16, SHAPES[LOGITS], Size(4, 3), Size(1024, 768), 0)


async def use(cache, number, seen):
    """Every command of the cache; what came of it, or that there was no answer."""
    header = header_of(number)
    value = float(number)

    async def claim() -> RecordHeader | None:
        found, _ = await cache.peek_or_claim(LOGITS, [header.address], ttl_s=60, claim_ms=50)
        return found

    for call in (
        lambda: cache.put((header, torch.full(SHAPES[LOGITS], value)), ttl_s=60),
        lambda: cache.peek(LOGITS, [header.address], ttl_s=60),
        lambda: cache.get(LOGITS, [header.address], ttl_s=60),
        claim,
        lambda: cache.release(header.address),
    ):
        try:
            answer = await call()
        except CacheUnavailable:
            seen["unavailable"] += 1
            await asyncio.sleep(0)
            continue
        if isinstance(answer, RecordHeader):
            assert answer == header
            seen["found"] += 1
        elif isinstance(answer, tuple):
            assert answer[0] == header
            assert bool((answer[1] == value).all())
            seen["found"] += 1


@pytest.mark.parametrize("damage", ["delay", "reset", "truncate", "flip", "swap"])
async def test_damaged_reply_is_never_another_record(damage, redis_server: RedisProcess, metrics, monkeypatch):
    monkeypatch.setattr("splitsam.common.cache._BREAKER_OPEN_S", 0.0)  # else most calls would never reach the proxy
    seen = {"found": 0, "unavailable": 0}
    with Proxy(("127.0.0.1", redis_server.port)) as proxy:
        url = f"redis://127.0.0.1:{proxy.address[1]}/0"
        cache = RecordCache(url, timeout_ms=100, connections=CALLERS, metrics=metrics)
        proxy.set(damage)

        async def work(caller):
            for number in range(ROUNDS if damage != "delay" else 4):
                await use(cache, 1 + number * CALLERS + caller, seen)

        await asyncio.gather(*(work(caller) for caller in range(CALLERS)))
        proxy.set("nothing")
        assert proxy.damaged > 0
        found = seen["found"]
        async with asyncio.timeout(10):
            while seen["found"] < found + 2:
                await use(cache, 10_000, seen)
        await cache.close()
