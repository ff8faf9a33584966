"""The decoder hears of an image that was just encoded, and holds it by the first click; nobody waits for that."""

import asyncio

import grpc
import pytest
from e2e_support import DEADLINE_S, TOKENS, draw, image_file, metric, refusal, wait_until

from splitsam.client import AsyncClient, Client
from splitsam.v1 import decoder_pb2 as pb

GONE = "127.0.0.1:1"


class Counts:
    """Of one decoder: prefetches by result, lookups by tier and result, evictions."""

    def __init__(self, stack):
        self._url = stack.metrics_url("decoder")

    def prefetched(self, result):
        return metric(self._url, "splitsam_prefetches_total", result=result)

    def looked_up(self, tier, result):
        return metric(self._url, "splitsam_cache_lookups_total", kind="embedding", tier=tier, result=result)

    def evicted(self):
        return metric(self._url, "splitsam_evictions_total", kind="embedding")


@pytest.fixture
def counts(stack):
    return Counts(stack)


def connect(kind, stack, **options):
    times = {"encode_timeout_s": DEADLINE_S, "predict_timeout_s": DEADLINE_S}
    return kind(stack.encoder, stack.decoder, token=TOKENS["alpha"], **times, **options)


def test_first_click_after_an_encode_finds_the_embedding_in_memory(stack, counts):
    fetched, resident = counts.prefetched("fetched"), counts.prefetched("resident")
    with connect(Client, stack) as client:
        image = client.encode(image_file(draw(500)))
        wait_until(lambda: counts.prefetched("fetched") == fetched + 1, "the decoder has it")
        before = [counts.looked_up(*at) for at in (("memory", "hit"), ("memory", "miss"), ("redis", "hit"))]
        assert client.predict(image, points=[(5, 5)])
        after = [counts.looked_up(*at) for at in (("memory", "hit"), ("memory", "miss"), ("redis", "hit"))]
        assert after == [before[0] + 1, before[1], before[2]]
        client.encode(image_file(draw(500)))
        wait_until(lambda: counts.prefetched("resident") == resident + 1, "the decoder says that it has it")


async def test_asyncio_client_prefetches_too(stack, counts):
    def told():
        return counts.prefetched("fetched") + counts.prefetched("resident")

    before = told()
    async with connect(AsyncClient, stack) as client:
        image = await client.encode(image_file(draw(501)))
        hits = counts.looked_up("memory", "hit")
        assert await client.predict(image, points=[(5, 5)])  # meets the prefetch on its way, or what it has brought
        assert await client.predict(image, points=[(6, 6)])
        assert counts.looked_up("memory", "hit") >= hits + 1
        await asyncio.to_thread(wait_until, lambda: told() == before + 1, "the decoder was told")


def test_client_that_does_not_want_it_tells_nobody(stack, counts):
    before = [counts.prefetched(result) for result in ("fetched", "resident", "failed")]
    misses = counts.looked_up("memory", "miss")
    with connect(Client, stack, prefetch=False) as client:
        image = client.encode(image_file(draw(502)))
        assert client.predict(image, points=[(5, 5)])
    assert counts.looked_up("memory", "miss") == misses + 1
    assert [counts.prefetched(result) for result in ("fetched", "resident", "failed")] == before


def test_decoder_that_is_away_does_not_disturb_an_encode(stack, photo):
    with Client(stack.encoder, GONE, token=TOKENS["alpha"], encode_timeout_s=DEADLINE_S) as client:
        assert client.encode(photo).stored


async def test_decoder_that_is_away_does_not_disturb_an_asyncio_encode(stack, photo):
    async with AsyncClient(stack.encoder, GONE, token=TOKENS["alpha"], encode_timeout_s=DEADLINE_S) as client:
        assert (await client.encode(photo)).stored


def test_prefetch_of_what_is_not_there_fails_and_is_counted(alpha, beta, key, counts):
    failed = counts.prefetched("failed")
    for caller, asked, code in (
        (alpha, "0" * 64, grpc.StatusCode.NOT_FOUND),
        (beta, key, grpc.StatusCode.NOT_FOUND),
        (alpha, "no key", grpc.StatusCode.INVALID_ARGUMENT),
    ):
        request = pb.PrefetchEmbeddingRequest(embedding_key=asked)
        refused = refusal(lambda caller=caller, r=request: caller.decoder.PrefetchEmbedding(r, **caller.options()))
        assert refused.code is code
    assert counts.prefetched("failed") == failed + 2


def test_embeddings_that_make_room_are_counted(open_stack):
    counts = Counts(open_stack)  # whose decoder keeps one
    with Client(open_stack.encoder, open_stack.decoder, encode_timeout_s=DEADLINE_S) as client:
        for number in (503, 504):
            fetched = counts.prefetched("fetched")
            client.encode(image_file(draw(number)))
            wait_until(lambda before=fetched: counts.prefetched("fetched") > before, "the decoder has it")
    assert counts.evicted() >= 1
