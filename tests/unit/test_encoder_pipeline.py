"""An image's way to a stored embedding against a real Redis; the model is a function of the image's size."""

import asyncio
import functools
import hashlib
import io
import struct
import threading
import time
from collections.abc import Callable, Sequence

import pytest
import torch
from PIL import Image
from redis_process import RedisProcess

from splitsam.common import admission, batcher
from splitsam.common.batcher import Batcher, Lane
from splitsam.common.cache import RecordCache
from splitsam.common.calls import Call, current_call, share_of_deadline_s
from splitsam.common.errors import DeadlineTooShort, EmbeddingExpired, InvalidArgument, QueueFull
from splitsam.common.keys import Address, EncodingVersion
from splitsam.common.metrics import Metrics
from splitsam.common.records import EMBEDDING, SHAPES, Size
from splitsam.encoder_service import pipeline
from splitsam.encoder_service.model import DeviceImage
from splitsam.encoder_service.pipeline import Encoded, EncodePipeline
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
        self.decoded: list[int] = []
        self.encoded: list[int] = []
        self.may_decode = threading.Event()
        self.may_decode.set()
        self.decode_s = 0.0
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
        self.on_device: Callable[[bytes], DeviceImage | None] = lambda _: None
        self.pipeline = EncodePipeline(
            self.batcher,
            self.cache,
            self.keys,
            VERSION,
            settings,
            metrics,
            self._pin,
            decode_on_device=lambda image: self.on_device(image),
        )

    def _pin(self, image: PreparedImage) -> PreparedImage:
        """On the thread that has decoded an image."""
        self.decoded.append(image.image_size[0])
        self.may_decode.wait()
        time.sleep(self.decode_s)
        return image

    def _run(self, images: Sequence[PreparedImage]) -> list[torch.Tensor]:
        self.computed += len(images)
        self.encoded += [image.image_size[0] for image in images]
        self.started.set()
        self.go.wait()
        time.sleep(self.model_s)
        return [torch.full(SHAPES[EMBEDDING], float(image.image_size[0])) for image in images]

    async def __aenter__(self) -> "Replica":
        self.batcher.start()
        self.pipeline.start()
        return self

    async def __aexit__(self, *_error: object) -> None:
        self.may_decode.set()
        self.go.set()
        await self.pipeline.close()
        await self.batcher.close()
        await self.cache.close()
        assert not self.pipeline._works

    def encode(self, *widths: int, lane: Lane = Lane.BULK, tenant: str = "acme") -> list[asyncio.Task[Encoded]]:
        return [asyncio.create_task(self.pipeline.encode(tenant, picture(width), lane)) for width in widths]

    async def waiting(self, batcher: str, count: int) -> None:
        """Until so many images wait for a thread that decodes ("prepare") or for the model ("encoder")."""
        labels = {"batcher": batcher}
        await until(lambda: self.metrics.registry.get_sample_value("splitsam_queue_length", labels) == count)

    async def promoted(self, count: int = 1) -> None:
        """Until so many images are in work for a click."""
        await until(lambda: sum(work.lane is Lane.CLICK for work in self.pipeline._works.values()) == count)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 (metrics make no events)
            await asyncio.sleep(0.001)


async def busy_decoding(replica: Replica, *widths: int) -> list[asyncio.Task[Encoded]]:
    """Bulk images, the first being decoded until `may_decode`, the others behind it in order."""
    replica.may_decode.clear()
    tasks: list[asyncio.Task[Encoded]] = []
    for behind, width in enumerate(widths):
        tasks += replica.encode(width)
        await until(lambda: replica.decoded)
        await replica.waiting("prepare", behind)
    return tasks


def picture(width: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, 20), (width % 256, 10, 200)).save(file, "PNG")
    return file.getvalue()


async def test_what_is_decoded_on_the_device_is_not_decoded_again(redis_server: RedisProcess):
    async with Replica(redis_server.url) as replica:
        on_device = DeviceImage(torch.zeros(20, 1024, 3, dtype=torch.uint8), (40, 20), (1024, 512), 0)
        replica.on_device = {picture(40): on_device}.get
        [there, _] = await asyncio.gather(*replica.encode(40, 41))
        assert (there.header.image_size, replica.decoded) == (Size(40, 20), [41])
        cropped = await replica.pipeline.encode("acme", picture(40), Lane.CLICK, crop=(0, 0, 10, 10))
        assert cropped.header.image_size == Size(10, 10)
        assert sorted(replica.encoded) == [10, 40, 41]


async def test_an_image_is_computed_once_by_two_replicas(redis_server: RedisProcess):
    async with Replica(redis_server.url) as one, Replica(redis_server.url) as other:
        jobs = [replica.pipeline.encode("acme", picture(31), Lane.CLICK) for replica in (one, other) for _ in range(4)]
        encoded = await asyncio.gather(*jobs)
    assert one.computed + other.computed == 1
    assert len({result.header.address for result in encoded}) == 1
    assert all(result.stored for result in encoded)


def set_claim(redis_server: RedisProcess, address: Address) -> None:
    """As another replica does that encodes the image."""
    with redis_server.client() as redis:
        redis.set(address.redis_name("claim"), b"1", px=60_000)


def is_claimed(redis_server: RedisProcess, address: Address) -> bool:
    with redis_server.client() as redis:
        return bool(redis.exists(address.redis_name("claim")))


async def test_a_claim_whose_holder_failed_is_taken_over(redis_server: RedisProcess):
    async with Replica(redis_server.url, "--claim-wait-ms", "60000") as replica:
        (address,) = replica.keys.embedding_addresses("acme", hashlib.sha256(picture(32)).digest(), VERSION)
        set_claim(redis_server, address)
        waiting = asyncio.create_task(replica.pipeline.encode("acme", picture(32), Lane.CLICK))
        await asyncio.sleep(0)
        await replica.cache.release(address)
        encoded = await waiting
        assert replica.computed == 1
        assert encoded.stored
        assert not encoded.cache_hit
        assert not is_claimed(redis_server, address), "the claim was given back"


async def test_an_image_is_encoded_anyway_when_a_claim_outlasts_the_wait(redis_server: RedisProcess):
    async with Replica(redis_server.url, "--claim-wait-ms", "0") as replica:
        (address,) = replica.keys.embedding_addresses("acme", hashlib.sha256(picture(33)).digest(), VERSION)
        set_claim(redis_server, address)
        encoded = await replica.pipeline.encode("acme", picture(33), Lane.CLICK)
        assert (replica.computed, encoded.stored) == (1, True)
        assert is_claimed(redis_server, address), "a claim of somebody else is left alone"


async def test_a_failed_image_gives_its_claim_back(redis_server: RedisProcess):
    async with Replica(redis_server.url) as replica:
        with pytest.raises(InvalidArgument, match="image"):
            await replica.pipeline.encode("acme", b"not an image", Lane.CLICK)
        (address,) = replica.keys.embedding_addresses("acme", hashlib.sha256(b"not an image").digest(), VERSION)
        assert not is_claimed(redis_server, address)


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


async def test_a_click_is_decoded_and_encoded_before_bulk_images_that_came_earlier(redis_server: RedisProcess):
    async with Replica(redis_server.url, "--decode-threads", "1") as replica:
        bulk = await busy_decoding(replica, *range(300, 308))
        [click] = replica.encode(299, lane=Lane.CLICK)
        await replica.waiting("prepare", 8)
        start_s = time.monotonic()
        await asyncio.sleep(0.05)
        held_ms = (time.monotonic() - start_s) * 1000
        replica.may_decode.set()
        timings = (await click).timings
        unfinished = sum(not task.done() for task in bulk)
        await asyncio.gather(*bulk)
    assert replica.decoded == replica.encoded == [300, 299, *range(301, 308)]
    assert unfinished
    assert timings.queue_ms >= held_ms
    assert timings.preprocess_ms > 0
    sample = replica.metrics.registry.get_sample_value
    assert sample("splitsam_queue_seconds_count", {"batcher": "prepare"}) == 9
    assert sample("splitsam_image_decode_seconds_count") == 9
    assert sample("splitsam_batch_fill_count", {"batcher": "prepare"}) is None


async def test_tenants_take_turns_at_the_threads_that_decode(redis_server: RedisProcess):
    async with Replica(redis_server.url, "--decode-threads", "1") as replica:
        tasks = await busy_decoding(replica, 310, 311, 312, 313)
        for width, count in ((410, 4), (411, 5)):
            tasks += replica.encode(width, tenant="globex")
            await replica.waiting("prepare", count)
        replica.may_decode.set()
        await asyncio.gather(*tasks)
    assert replica.decoded == [310, 410, 311, 411, 312, 313]


async def test_a_bulk_image_that_somebody_opens_is_decoded_before_other_bulk_images(redis_server: RedisProcess):
    async with Replica(redis_server.url, "--decode-threads", "1") as replica:
        tasks = await busy_decoding(replica, 320, 321, 322, 323)
        tasks += replica.encode(323, lane=Lane.CLICK)
        await replica.promoted()
        tasks += replica.encode(323)  # the lane stays the first one
        replica.may_decode.set()
        assert len({encoded.header.address for encoded in await asyncio.gather(*tasks)}) == 4
    assert replica.decoded == replica.encoded == [320, 323, 321, 322]


async def test_a_decoded_bulk_image_that_somebody_opens_is_encoded_before_other_bulk_images(redis_server: RedisProcess):
    async with Replica(redis_server.url) as replica:
        replica.go.clear()
        tasks = replica.encode(330)
        await asyncio.to_thread(replica.started.wait)
        for count, width in enumerate((331, 332, 333), start=1):
            tasks += replica.encode(width)
            await replica.waiting("encoder", count)
        tasks += replica.encode(333, lane=Lane.CLICK)
        await replica.promoted()
        replica.go.set()
        await asyncio.gather(*tasks)
    assert replica.encoded == [330, 333, 331, 332]


async def test_a_bulk_image_that_somebody_opens_before_it_waits_comes_into_the_lane_of_clicks(
    redis_server: RedisProcess,
):
    async with Replica(redis_server.url, "--decode-threads", "1", "--claim-wait-ms", "60000") as replica:
        (address,) = replica.keys.embedding_addresses("acme", hashlib.sha256(picture(343)).digest(), VERSION)
        set_claim(redis_server, address)
        tasks = await busy_decoding(replica, 340, 341, 342)
        tasks += replica.encode(343)
        tasks += replica.encode(343, lane=Lane.CLICK)
        await replica.promoted()
        await replica.cache.release(address)
        await replica.waiting("prepare", 3)
        replica.may_decode.set()
        await asyncio.gather(*tasks)
    assert replica.decoded == [340, 343, 341, 342]


class Clock:
    """Real time, and what a test adds to it."""

    def __init__(self) -> None:
        self.ahead_s = 0.0
        self.perf_counter = time.perf_counter

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in (admission, batcher, pipeline):
        monkeypatch.setattr(module, "time", made)
    return made


BOUNDS = "--max-queue-ms", "30000", "--max-bulk-queue-ms", "60000", "--encode-timeout-ms", "600000"


async def test_a_promoted_image_has_the_longest_wait_of_a_click_from_then_on(redis_server: RedisProcess, clock: Clock):
    """In both queues: the time before it does not count in either."""
    async with Replica(redis_server.url, "--decode-threads", "1", *BOUNDS) as replica:
        first, late, opened = await busy_decoding(replica, 350, 351, 352)
        clock.ahead_s += 50
        clicks = replica.encode(352, lane=Lane.CLICK)
        await replica.promoted()
        clock.ahead_s += 20
        replica.may_decode.set()
        with pytest.raises(QueueFull, match="waited longer"):
            await late
        await asyncio.gather(first, opened, *clicks)
    assert replica.decoded == replica.encoded == [350, 352]


async def test_the_wait_in_both_queues_together_is_bounded(redis_server: RedisProcess, clock: Clock):
    async with Replica(redis_server.url, "--decode-threads", "1", *BOUNDS) as replica:
        replica.go.clear()
        first, second = await busy_decoding(replica, 360, 361)
        clock.ahead_s += 40
        replica.may_decode.set()
        await replica.waiting("encoder", 1)
        clock.ahead_s += 40
        replica.go.set()
        assert (await first).stored
        with pytest.raises(QueueFull, match="waited longer"):
            await second
    assert replica.encoded == [360]


async def test_an_image_that_nobody_waits_for_or_that_is_too_late_is_not_decoded(
    redis_server: RedisProcess, clock: Clock
):
    async with Replica(redis_server.url, "--decode-threads", "1", *BOUNDS) as replica:
        busy, cancelled, late = await busy_decoding(replica, 370, 371, 372)
        cancelled.cancel()
        clock.ahead_s += 70
        replica.may_decode.set()
        with pytest.raises(QueueFull) as caught:
            await late
        assert caught.value.retry_delay_s
        assert (await busy).stored
        assert cancelled.cancelled()
    assert replica.decoded == [370]


async def test_images_that_would_wait_too_long_to_be_decoded_are_refused(redis_server: RedisProcess):
    async with Replica(redis_server.url, "--decode-threads", "1", "--max-queue-ms", "1000") as replica:
        replica.decode_s = 0.25
        for width in (598, 599):
            await replica.pipeline.encode("acme", picture(width), Lane.CLICK)
        jobs = replica.encode(*range(500, 520), lane=Lane.CLICK)
        outcomes = await asyncio.gather(*jobs, return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert {type(refusal) for refusal in refused} == {QueueFull}
    assert all(refusal.retry_delay_s for refusal in refused)
    assert 1 <= len(replica.decoded) - 2 <= 6  # as many as fit into a second, not all that came


async def test_a_deadline_before_an_image_could_be_decoded_refuses_it(redis_server: RedisProcess):
    async with Replica(redis_server.url, "--decode-threads", "1") as replica:
        replica.decode_s = 0.25
        await asyncio.gather(*replica.encode(600))
        replica.decoded.clear()
        tasks = await busy_decoding(replica, 601)
        check_room = functools.partial(replica.pipeline.check_room, "acme", Lane.CLICK, time.monotonic() + 60)
        check_room()
        with pytest.raises(DeadlineTooShort):
            check_room(weight=1000)
        large = picture(602)[:16] + struct.pack(">II", 60_000, 60_000) + picture(602)[24:]
        refused = asyncio.create_task(replica.pipeline.encode("acme", large, Lane.CLICK, time.monotonic() + 60))
        await replica.waiting("prepare", 1)  # it will not be decoded, and so does not take long
        replica.may_decode.set()
        with pytest.raises(InvalidArgument):
            await refused
        await asyncio.gather(*tasks)


async def test_bulk_images_on_their_way_take_neither_time_nor_places_of_clicks(redis_server: RedisProcess):
    async with Replica(redis_server.url, "--decode-threads", "1", "--max-queue", "7") as replica:
        replica.model_s = 0.5
        await replica.pipeline.encode("acme", picture(379), Lane.CLICK)
        replica.decoded.clear()
        tasks = await busy_decoding(replica, *range(380, 387))
        check_room = functools.partial(replica.pipeline.check_room, "acme")
        check_room(Lane.CLICK, time.monotonic() + 3)
        with pytest.raises(QueueFull):
            check_room(Lane.BULK)
        tasks[-1].cancel()
        await asyncio.gather(tasks[-1], return_exceptions=True)
        check_room(Lane.BULK)
        with pytest.raises(DeadlineTooShort):
            check_room(Lane.BULK, time.monotonic() + 3)
        replica.model_s = 0.0
        replica.may_decode.set()
        await asyncio.gather(*tasks[:-1])


@pytest.mark.parametrize(("left_s", "expected_s"), [(None, 1.0), (600.0, 1.0), (-5.0, 0.1)])
async def test_a_step_waits_for_a_share_of_the_deadline(left_s: float | None, expected_s: float):
    deadline_s = None if left_s is None else time.monotonic() + left_s
    current_call.set(Call(tenant="acme", request_id="id", method="EncodeImage", deadline_s=deadline_s))
    assert share_of_deadline_s(1.0) == expected_s


async def test_new_images_are_not_counted_as_embeddings_that_are_gone(redis_server: RedisProcess):
    """Else the alert about the room in Redis would go off wherever images are encoded."""
    async with Replica(redis_server.url) as replica:

        def counted(kind: str, result: str) -> float:
            labels = {"kind": kind, "tier": "redis", "result": result}
            return replica.metrics.registry.get_sample_value("splitsam_cache_lookups_total", labels) or 0.0

        assert await replica.pipeline.look_up("acme", hashlib.sha256(picture(108)).digest()) is None
        encoded = await replica.pipeline.encode("acme", picture(108), Lane.CLICK)
        await replica.pipeline.fetch("acme", encoded.header.address.key)
        assert (counted("embedding", "hit"), counted("embedding", "miss")) == (1, 0)
        assert counted("header", "miss") > 0
        with pytest.raises(EmbeddingExpired):
            await replica.pipeline.fetch("acme", bytes(32))
        assert counted("embedding", "miss") == 1


async def test_processes_decode_as_threads_do(redis_server: RedisProcess):
    async with Replica(redis_server.url, "--decode-processes", "2") as replica:
        [encoded] = await asyncio.gather(*replica.encode(91))
        with pytest.raises(InvalidArgument, match="image"):
            await replica.pipeline.encode("acme", b"no image", Lane.CLICK)
        processes = [worker._process for worker in replica.pipeline._workers._workers]
    assert (encoded.header.image_size.width, replica.encoded) == (91, [91])
    assert [process.returncode for process in processes] == [0, 0]
