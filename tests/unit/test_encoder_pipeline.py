"""An image's way to a stored embedding against a real Redis; the model is a function of the image's size."""

import asyncio
import hashlib
import io
import threading
import time
from collections.abc import Sequence

import pytest
import torch
from PIL import Image
from redis_process import RedisProcess

from splitsam.common.batcher import Batcher, Lane
from splitsam.common.cache import RecordCache
from splitsam.common.calls import Call, current_call, share_of_deadline_s
from splitsam.common.errors import DeadlineTooShort, InvalidArgument, QueueFull
from splitsam.common.keys import EncodingVersion
from splitsam.common.metrics import Metrics
from splitsam.common.records import EMBEDDING, SHAPES
from splitsam.encoder_service.pipeline import EncodePipeline
from splitsam.encoder_service.preprocess import PreparedImage
from splitsam.encoder_service.settings import EncoderSettings

VERSION = EncodingVersion("0e" * 32, "1", "fp32", "fp16")


class Replica:
    """One encoder process's pipeline, counting what it computes."""

    def __init__(self, url: str, *arguments: str):
        metrics = Metrics()
        settings = EncoderSettings.load(arguments)
        self.computed = 0
        self.keys = settings.key_ring()
        self.cache = RecordCache(url, timeout_ms=30_000, connections=4, metrics=metrics)
        self.model_s = 0.0
        self.started, self.go = threading.Event(), threading.Event()
        self.go.set()
        self.metrics = metrics
        self.batcher = Batcher(
            self._run,
            name="encoder",
            max_weight=1,
            max_wait_ms=0,
            max_queue=8,
            max_queue_ms=settings.lane_queue_ms,
            metrics=metrics,
        )
        self.pipeline = EncodePipeline(self.batcher, self.cache, self.keys, VERSION, settings, metrics)

    def _run(self, images: Sequence[PreparedImage]) -> list[torch.Tensor]:
        self.computed += len(images)
        self.started.set()
        self.go.wait()
        time.sleep(self.model_s)
        return [torch.full(SHAPES[EMBEDDING], float(image.image_size[0])) for image in images]

    async def __aenter__(self) -> "Replica":
        self.batcher.start()
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.batcher.close()
        await self.pipeline.close()
        await self.cache.close()


def picture(width: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, 20), (width % 256, 10, 200)).save(file, "PNG")
    return file.getvalue()


async def test_an_image_is_computed_once_by_two_replicas(redis_server: RedisProcess):
    async with Replica(redis_server.url) as one, Replica(redis_server.url) as other:
        jobs = [replica.pipeline.encode("acme", picture(31), Lane.CLICK) for replica in (one, other) for _ in range(4)]
        encoded = await asyncio.gather(*jobs)
    assert one.computed + other.computed == 1
    assert len({result.header.address for result in encoded}) == 1
    assert all(result.stored for result in encoded)


async def test_a_claim_whose_holder_failed_is_taken_over(redis_server: RedisProcess):
    async with Replica(redis_server.url, "--claim-wait-ms", "60000") as replica:
        (address,) = replica.keys.embedding_addresses("acme", hashlib.sha256(picture(32)).digest(), VERSION)
        assert await replica.cache.claim(address, ttl_ms=60_000)
        waiting = asyncio.create_task(replica.pipeline.encode("acme", picture(32), Lane.CLICK))
        await asyncio.sleep(0)
        await replica.cache.release(address)
        encoded = await waiting
        assert replica.computed == 1
        assert encoded.stored
        assert not encoded.cache_hit
        assert await replica.cache.claim(address, ttl_ms=10), "the claim was given back"


async def test_an_image_is_encoded_anyway_when_a_claim_outlasts_the_wait(redis_server: RedisProcess):
    async with Replica(redis_server.url, "--claim-wait-ms", "0") as replica:
        (address,) = replica.keys.embedding_addresses("acme", hashlib.sha256(picture(33)).digest(), VERSION)
        assert await replica.cache.claim(address, ttl_ms=60_000)
        encoded = await replica.pipeline.encode("acme", picture(33), Lane.CLICK)
        assert (replica.computed, encoded.stored) == (1, True)
        assert not await replica.cache.claim(address, ttl_ms=10), "a claim of somebody else is left alone"


async def test_a_failed_image_gives_its_claim_back(redis_server: RedisProcess):
    async with Replica(redis_server.url) as replica:
        with pytest.raises(InvalidArgument, match="image"):
            await replica.pipeline.encode("acme", b"not an image", Lane.CLICK)
        (address,) = replica.keys.embedding_addresses("acme", hashlib.sha256(b"not an image").digest(), VERSION)
        assert await replica.cache.claim(address, ttl_ms=10)


async def test_images_that_come_at_once_are_refused_before_they_are_decoded(redis_server: RedisProcess):
    """None of them waits for the model yet: those being prepared are counted."""
    async with Replica(redis_server.url, "--max-queue-ms", "1000") as replica:
        replica.model_s = 0.25
        for width in (101, 102):
            await replica.pipeline.encode("acme", picture(width), Lane.CLICK)
        jobs = [replica.pipeline.encode("acme", picture(width), Lane.CLICK) for width in range(200, 240)]
        outcomes = await asyncio.gather(*jobs, return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert {type(refusal) for refusal in refused} == {QueueFull}
    assert all(refusal.retry_delay_s for refusal in refused)
    assert 1 <= len(outcomes) - len(refused) == replica.computed - 2
    decoded = replica.metrics.registry.get_sample_value("splitsam_image_decode_seconds_count")
    assert decoded <= 2 + 6  # as many as fit into a second, not all that came


async def test_an_image_that_many_send_is_not_counted_many_times(redis_server: RedisProcess):
    async with Replica(redis_server.url, "--max-queue-ms", "1000") as replica:
        replica.model_s = 0.25
        await replica.pipeline.encode("acme", picture(103), Lane.CLICK)
        await asyncio.gather(*(replica.pipeline.encode("acme", picture(104), Lane.CLICK) for _ in range(40)))
        assert replica.computed == 2


async def test_a_deadline_refuses_its_own_caller_only(redis_server: RedisProcess):
    async with Replica(redis_server.url) as replica:
        replica.model_s = 0.25
        await replica.pipeline.encode("acme", picture(105), Lane.CLICK)
        replica.go.clear()
        replica.started.clear()
        patient = asyncio.create_task(replica.pipeline.encode("acme", picture(106), Lane.CLICK))
        await asyncio.to_thread(replica.started.wait)
        with pytest.raises(DeadlineTooShort):
            await replica.pipeline.encode("acme", picture(107), Lane.CLICK, time.monotonic() + 0.1)
        replica.go.set()
        assert (await patient).stored


@pytest.mark.parametrize(("left_s", "expected_s"), [(None, 1.0), (600.0, 1.0), (-5.0, 0.1)])
async def test_a_step_waits_for_a_share_of_the_deadline(left_s: float | None, expected_s: float):
    deadline_s = None if left_s is None else time.monotonic() + left_s
    current_call.set(Call(tenant="acme", request_id="id", method="EncodeImage", deadline_s=deadline_s))
    assert share_of_deadline_s(1.0) == expected_s
