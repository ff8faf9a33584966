"""Tokens that are good at once, and logits that reach a real Redis behind the answer."""

import dataclasses
import os
from collections.abc import AsyncIterator, Callable

import pytest
import torch
from redis_process import RedisProcess

from splitsam.common.cache import RecordCache
from splitsam.common.codecs import FP16
from splitsam.common.errors import RefinementExpired
from splitsam.common.keys import Address, KeyRing
from splitsam.common.metrics import Metrics
from splitsam.common.records import EMBEDDING, SHAPES, RecordHeader, Size
from splitsam.decoder_service import refinements
from splitsam.decoder_service.refinements import RefinementStore

KEYS = KeyRing([b"a secret of sixteen bytes"])
LOGITS = torch.randn(256, 256, generator=torch.Generator().manual_seed(1)).half()


@pytest.fixture
async def start(metrics: Metrics) -> AsyncIterator[Callable[..., RefinementStore]]:
    """Makes the store of one replica."""
    caches: list[RecordCache] = []

    def make(server: RedisProcess, timeout_ms: int = 30_000) -> RefinementStore:
        caches.append(RecordCache(server.url, timeout_ms=timeout_ms, connections=2, metrics=metrics))
        return RefinementStore(caches[-1], KEYS, budget_bytes=2**24, ttl_s=60, metrics=metrics)

    yield make
    for cache in caches:
        await cache.close()


@pytest.fixture
def embedding() -> RecordHeader:
    return RecordHeader(
        kind=EMBEDDING,
        address=Address(os.urandom(16), os.urandom(32)),
        model_id="0f" * 32,
        codec=FP16,
        shape=SHAPES[EMBEDDING],
        image_size=Size(640, 480),
        input_size=Size(1024, 768),
        orientation=0,
    )


async def load(store: RefinementStore, embedding: RecordHeader, token: str) -> torch.Tensor:
    return torch.from_numpy((await store.load("acme", embedding.address.key, token)).copy())


async def test_token_is_good_at_once_here_and_after_the_write_elsewhere(start, redis_server, embedding):
    here, there = start(redis_server), start(redis_server)
    tokens = [here.save("acme", embedding, 1, LOGITS + number) for number in range(20)]
    assert torch.equal(await load(here, embedding, tokens[7]), LOGITS + 7)
    await here.close()
    for number, token in enumerate(tokens):
        assert torch.equal(await load(there, embedding, token), LOGITS + number)
    with pytest.raises(RefinementExpired):
        await there.load("another", embedding.address.key, tokens[0])
    with pytest.raises(RefinementExpired):
        await there.load("acme", os.urandom(32), tokens[0])


def unstored(metrics: Metrics, why: str) -> float:
    labels = {"kind": "logits", "why": why}
    return metrics.registry.get_sample_value("splitsam_cache_unstored_total", labels) or 0.0


async def test_nobody_waits_for_a_redis_that_hangs_and_memory_is_bounded(
    start, start_redis, embedding, monkeypatch, metrics, caplog
):
    monkeypatch.setattr(refinements, "_MOST_WAITING", 3)
    server = start_redis()
    store = start(server, timeout_ms=200)
    server.pause()
    try:
        tokens = [store.save("acme", embedding, 0, LOGITS + number) for number in range(9)]
        assert len(store._waiting) == 3
        for number, token in enumerate(tokens):
            assert torch.equal(await load(store, embedding, token), LOGITS + number)
        await store.close()
        assert not store._waiting
        assert (unstored(metrics, "backlog"), unstored(metrics, "unavailable")) == (6, 3)
        assert len([record for record in caplog.records if record.name == "splitsam.refinements"]) == 1
    finally:
        server.resume()
    again = start(server)
    token = again.save("acme", dataclasses.replace(embedding, orientation=1), 0, LOGITS)
    await again.close()
    assert torch.equal(await load(start(server), embedding, token), LOGITS)
