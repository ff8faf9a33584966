"""Room for requests: bounded in bytes, given in order, given back whatever happens."""

import asyncio
import contextlib
import random

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from probe_service import SERVICE, Probe, running

from splitsam.common.errors import QueueFull
from splitsam.common.metrics import Metrics
from splitsam.common.settings import SettingsProblem
from splitsam.common.uploads import SMALL_REQUEST_BYTES, UploadBudget
from splitsam.decoder_service.service import DecoderService
from splitsam.encoder_service.service import EncoderService
from splitsam.encoder_service.settings import EncoderSettings
from splitsam.v1 import decoder_pb2
from splitsam.v1 import encoder_pb2 as pb

IMAGE = 2**20
LARGEST = IMAGE + 2**16
LIMIT_S = 20.0
# Room for two requests that are being read.
TWO = ("--max-image-bytes", str(IMAGE), "--max-upload-bytes", str(2 * LARGEST))
PATIENT = ("--upload-wait-ms", "20000")


@pytest.fixture
async def probe() -> Probe:
    return Probe()


def used(metrics: Metrics) -> float:
    return metrics.registry.get_sample_value("splitsam_upload_bytes")


async def until_used(metrics: Metrics, size_bytes: float) -> None:
    async with asyncio.timeout(LIMIT_S):
        while used(metrics) != size_bytes:  # noqa: ASYNC110 (a metric makes no event)
            await asyncio.sleep(0.01)


def waiting_request(size_bytes: int = 4) -> pb.EncodeImageRequest:
    return pb.EncodeImageRequest(image=b"wait".ljust(size_bytes))


@contextlib.asynccontextmanager
async def silent_calls(address: str, count: int):
    """Calls of a unary method whose request never comes."""
    async with grpc.aio.insecure_channel(address) as channel:
        calls = [channel.stream_unary(f"/{SERVICE}/EncodeImage")() for _ in range(count)]
        try:
            yield calls
        finally:
            for call in calls:
                call.cancel()


def reason(error: grpc.aio.AioRpcError) -> str:
    return error_details_pb2.ErrorInfo.FromString(rpc_status.from_call(error).details[0].value).reason


async def test_a_request_that_finds_no_room_is_refused_and_told_when_to_come_back(probe, metrics):
    async with running(probe, metrics, *TWO, "--upload-wait-ms", "50") as server:
        async with silent_calls(server.address, 2) as silent:
            await until_used(metrics, 2 * LARGEST)
            for image in (b"", b"x" * IMAGE):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await server.stub.EncodeImage(pb.EncodeImageRequest(image=image), timeout=LIMIT_S)
                assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
                assert reason(caught.value) == "QUEUE_FULL"
                assert int(dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
            await server.health_of("")  # asks for no room
            silent[0].cancel()
            await until_used(metrics, LARGEST)
            assert (await server.stub.EncodeImage(pb.EncodeImageRequest())).cache_hit
        await until_used(metrics, 0)


async def test_a_request_waits_for_room(probe, metrics):
    async with running(probe, metrics, *TWO, *PATIENT) as server:
        async with silent_calls(server.address, 2):
            await until_used(metrics, 2 * LARGEST)
            answer = server.stub.EncodeImage(pb.EncodeImageRequest(image=b"x"))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(answer._invocation_task), 0.1)
            assert probe.calls == []
        assert (await answer).cache_hit


async def test_a_request_in_work_takes_the_room_of_its_bytes_and_no_more(probe, metrics):
    async with running(probe, metrics, *TWO, "--upload-wait-ms", "50") as server:
        small = [server.stub.EncodeImage(waiting_request()) for _ in range(20)]
        size = waiting_request().ByteSize()
        await until_used(metrics, 20 * size)
        large = [server.stub.EncodeImage(waiting_request(IMAGE)) for _ in range(2)]
        await until_used(metrics, 20 * size + 2 * waiting_request(IMAGE).ByteSize())
        with pytest.raises(grpc.aio.AioRpcError) as caught:  # less is free than one that is being read may need
            await server.stub.EncodeImage(pb.EncodeImageRequest())
        assert reason(caught.value) == "QUEUE_FULL"
        probe.release.set()
        for answer in (*small, *large):
            assert (await answer).cache_hit
        await until_used(metrics, 0)


async def test_a_request_that_does_not_arrive_gives_its_room_back(probe, metrics):
    async with running(probe, metrics, *TWO, *PATIENT, "--upload-timeout-ms", "50") as server:
        async with silent_calls(server.address, 2) as silent:
            for call in silent:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
                assert reason(caught.value) == "UPLOAD_TOO_SLOW"
        assert (await server.stub.EncodeImage(pb.EncodeImageRequest())).cache_hit
        await until_used(metrics, 0)


async def test_a_call_without_a_request_is_invalid(probe, metrics):
    async with running(probe, metrics) as server, grpc.aio.insecure_channel(server.address) as channel:
        call = channel.stream_unary(f"/{SERVICE}/EncodeImage")()
        await call.done_writing()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_small_request_waits_for_no_upload(probe, metrics):
    async with running(probe, metrics, *TWO, *PATIENT) as server, silent_calls(server.address, 2):
        await until_used(metrics, 2 * LARGEST)
        behind = server.stub.EncodeImage(pb.EncodeImageRequest())  # stands in front of whoever shares its queue
        for _ in range(300):
            answers = server.stub.DownloadEmbedding(pb.DownloadEmbeddingRequest(), timeout=LIMIT_S)
            assert [answer.chunk async for answer in answers] == [b"first", b"last"]
        assert not behind.done()
        behind.cancel()


async def test_a_small_request_that_is_large_is_refused_and_told_the_limit(probe, metrics):
    async with running(probe, metrics) as server:
        for size_bytes, is_refused in ((SMALL_REQUEST_BYTES - 100, False), (SMALL_REQUEST_BYTES, True), (IMAGE, True)):
            request = pb.DownloadEmbeddingRequest(embedding_key="x" * size_bytes)
            answers = server.stub.DownloadEmbedding(request, timeout=LIMIT_S)
            if not is_refused:
                assert len([answer async for answer in answers]) == 2
                continue
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await answers.read()
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert caught.value.details().startswith("request: has ")
            assert "at most 65536 are allowed" in caught.value.details()
        await until_used(metrics, 0)
        assert len(probe.calls) == 1


@pytest.mark.parametrize("service", [EncoderService, DecoderService])
def test_methods_with_room_for_large_requests_are_those_with_images_or_logits(service):
    def holds(message) -> bool:
        fields = message.fields
        return any(
            field.name in ("image", "low_res_logits") or (field.message_type and holds(field.message_type))
            for field in fields
        )

    name = service.full_name.rpartition(".")[2]
    [descriptor] = [
        file.DESCRIPTOR.services_by_name[name] for file in (pb, decoder_pb2) if name in file.DESCRIPTOR.services_by_name
    ]
    assert service.large_requests == {method.name for method in descriptor.methods if holds(method.input_type)}


async def test_a_stream_is_read_on_when_there_is_room_again(probe, metrics):
    message = pb.EncodeImagesRequest(request_id=1, image=b"wait".ljust(IMAGE))
    async with running(probe, metrics, *TWO, *PATIENT) as server:
        streams = [server.stub.EncodeImages() for _ in range(2)]
        for stream in streams:
            await stream.write(message)
        await until_used(metrics, 2 * message.ByteSize())
        third = server.stub.EncodeImages()
        await third.write(message)
        assert (await server.health_of("")) == "SERVING"
        assert len(probe.calls) == 2
        streams.pop().cancel()
        async with asyncio.timeout(LIMIT_S):
            while len(probe.calls) < 3:  # noqa: ASYNC110 (calls make no event)
                await asyncio.sleep(0.01)
        probe.release.set()
        for stream in (*streams, third):
            assert (await stream.read()).request_id == 1
        await until_used(metrics, 0)  # answered, though the streams are open
        for stream in (*streams, third):
            stream.cancel()


async def test_an_idle_stream_takes_no_room(probe, metrics):
    async with running(probe, metrics, *TWO) as server:
        streams = [server.stub.EncodeImages() for _ in range(50)]
        for stream in streams:
            await stream.write(pb.EncodeImagesRequest(request_id=1))
            assert (await stream.read()).request_id == 1
        assert (await server.stub.EncodeImage(pb.EncodeImageRequest(image=b"x"))).cache_hit
        await until_used(metrics, 0)
        for stream in streams:
            stream.cancel()


async def test_room_is_given_back_by_calls_that_fail_or_are_cancelled(probe, metrics):
    probe.failures["fail"] = ValueError("a defect")
    async with running(probe, metrics, *TWO) as server:
        with pytest.raises(grpc.aio.AioRpcError):
            await server.stub.EncodeImage(pb.EncodeImageRequest(image=b"fail"))
        with pytest.raises(grpc.aio.AioRpcError):
            await server.channel.unary_unary(f"/{SERVICE}/EncodeImage")(b"\xff\xff")
        answer = server.stub.EncodeImage(waiting_request(1000))
        await probe.started.wait()
        answer.cancel()
        flood = server.stub.DownloadEmbedding(pb.DownloadEmbeddingRequest(embedding_key="flood"))
        await flood.read()
        flood.cancel()
        await until_used(metrics, 0)


async def test_room_is_taken_at_once_but_not_ahead_of_who_waits(metrics):
    budget = UploadBudget(EncoderSettings.load([]), metrics, room_bytes=100, largest_bytes=60)
    await budget._take(60)
    large, small = (asyncio.create_task(budget._take(size)) for size in (60, 20))
    await asyncio.sleep(0)
    assert (used(metrics), large.done(), small.done()) == (60, False, False)  # there would be room for the small one
    budget._give(60)
    await asyncio.wait_for(asyncio.gather(large, small), LIMIT_S)
    assert used(metrics) == 80


def test_a_budget_below_one_request_is_refused():
    with pytest.raises(SettingsProblem, match="max_upload_bytes"):
        EncoderSettings.load(["--max-upload-bytes", "1000"])


@pytest.mark.parametrize("seed", range(5))
async def test_room_is_never_exceeded_nor_lost(metrics, seed):
    limit = 2 * LARGEST
    settings = EncoderSettings.load([*TWO, "--upload-wait-ms", "10", "--max-queue", "40"])
    budget = UploadBudget(settings, metrics, limit, LARGEST)
    rng = random.Random(seed)
    most, refused = 0.0, 0

    async def one_call() -> None:
        nonlocal most, refused

        async def read() -> bytes:
            await asyncio.sleep(rng.random() / 100)
            return bytes(rng.randrange(IMAGE))

        try:
            async with budget.one(read, len):
                most = max(most, used(metrics))
                await asyncio.sleep(rng.random() / 100)
        except QueueFull:
            refused += 1

    calls = [asyncio.create_task(one_call()) for _ in range(200)]
    for call in rng.sample(calls, 60):
        asyncio.get_running_loop().call_later(rng.random() / 20, call.cancel)
    await asyncio.wait(calls)
    assert 0 < most <= limit
    assert refused
    assert used(metrics) == 0
    await asyncio.wait_for(budget._take(limit), LIMIT_S)  # all of it is there again
