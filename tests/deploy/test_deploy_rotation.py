"""The rotation of the HMAC secret as the guide has it: what one replica stores, all that run beside it find."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from manifests import DEPLOY
from redis_process import RedisProcess

from splitsam.common.cache import RecordCache
from splitsam.common.codecs import FP16
from splitsam.common.keys import EncodingVersion, KeyRing
from splitsam.common.metrics import Metrics
from splitsam.common.records import EMBEDDING, LOGITS, SHAPES, RecordHeader, Size
from splitsam.common.settings import ServiceSettings
from splitsam.decoder_service.settings import DecoderSettings
from splitsam.encoder_service.settings import EncoderSettings

# The contents of both files at each rollout.
ROLLOUTS = re.findall(r"^\| (?:before|\d) \| (OLD|NEW) \| ((?:OLD|NEW)?) ?\|", (DEPLOY / "README.md").read_text(), re.M)
TENANT = "acme"
VERSION = EncodingVersion(model_id="ab" * 32, preprocess_version="1", precision="fp32", codec="fp16")


@pytest.fixture
async def cache(redis_server: RedisProcess, metrics: Metrics):
    cache = RecordCache(redis_server.url, timeout_ms=30_000, connections=2, metrics=metrics)
    yield cache
    await cache.close()


def key_ring(service: type[ServiceSettings], rollout: tuple[str, str], folder: Path) -> KeyRing:
    arguments = []
    for flag, secret in zip(("--secret-file", "--previous-secret-file"), rollout, strict=True):
        if secret:
            (folder / secret).write_text(f"the {secret} secret of {folder}")
            arguments += [flag, str(folder / secret)]
    return service.load(arguments).key_ring()


async def clicks(cache: RecordCache, encoder: KeyRing, decoder: KeyRing, other: KeyRing) -> bool:
    """Whether a decoder finds what an encoder stores, and another one what that keeps to refine."""

    async def store(kind: bytes, address) -> None:
        header = RecordHeader(kind, address, "ab" * 32, FP16, SHAPES[kind], Size(4, 3), Size(1024, 768), 0)
        await cache.put((header, torch.ones(SHAPES[kind])), ttl_s=60)

    address = encoder.embedding_addresses(TENANT, bytes(32), VERSION)[0]
    await store(EMBEDDING, address)
    if await cache.get(EMBEDDING, decoder.addresses(TENANT, address.key), ttl_s=60) is None:
        return False
    token = decoder.new_refinement_address(TENANT, address.key, 0)
    await store(LOGITS, token)
    found = other.refinement_address(TENANT, address.key, token.key)
    return found is not None and await cache.get(LOGITS, [found], ttl_s=60) is not None


async def test_clicks_succeed_whatever_replica_of_two_rollouts_they_meet(cache: RecordCache, tmp_path: Path):
    assert (ROLLOUTS[0], ROLLOUTS[-1]) == (("OLD", ""), ("NEW", ""))
    for neighbours in itertools.pairwise(ROLLOUTS):
        for met in itertools.product(neighbours, repeat=3):
            services = zip((EncoderSettings, DecoderSettings, DecoderSettings), met, strict=True)
            assert await clicks(cache, *(key_ring(*each, tmp_path) for each in services)), met


async def test_clicks_fail_where_the_first_rollout_is_left_out(cache: RecordCache, tmp_path: Path):
    before, rotated = (key_ring(EncoderSettings, rollout, tmp_path) for rollout in (("OLD", ""), ("NEW", "OLD")))
    assert await clicks(cache, before, rotated, rotated)
    assert not await clicks(cache, rotated, before, before)
