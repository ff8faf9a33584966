"""The encoder's RPCs against a real cache, without a model."""

import os

import pytest
import torch
from redis_process import RedisProcess

from splitsam.common.batcher import Batcher
from splitsam.common.cache import RecordCache
from splitsam.common.calls import Call, current_call
from splitsam.common.codecs import BF16
from splitsam.common.errors import EmbeddingExpired, InvalidArgument
from splitsam.common.keys import EncodingVersion
from splitsam.common.messages import ModelInfo
from splitsam.common.metrics import Metrics
from splitsam.common.records import EMBEDDING, SHAPES, RecordHeader, Size
from splitsam.encoder_service.pipeline import EncodePipeline
from splitsam.encoder_service.servicer import EncoderServicer
from splitsam.encoder_service.settings import EncoderSettings
from splitsam.v1 import encoder_pb2 as pb
from splitsam.v1 import types_pb2

MODEL_ID = "0f" * 32


@pytest.fixture
async def stored(redis_server: RedisProcess, metrics: Metrics):
    """A servicer that stores fp16, and the header and values of an embedding stored as bf16 before that was so."""
    settings = EncoderSettings.load(["--codec", "fp16"])
    cache = RecordCache(redis_server.url, timeout_ms=30_000, connections=2, metrics=metrics)
    batcher = Batcher(list, name="encoder", max_weight=1, max_wait_ms=0, max_queue=1, metrics=metrics)
    keys, version = settings.key_ring(), EncodingVersion(MODEL_ID, "1", "fp32", "fp16")
    pipeline = EncodePipeline(batcher, cache, keys, version, settings, metrics)
    pipeline.start()
    servicer = EncoderServicer(settings)
    servicer.load(pipeline, ModelInfo("vit_t", MODEL_ID, True, "fp32", "cpu", "fp16", "1", ()))
    header = RecordHeader(
        kind=EMBEDDING,
        address=keys.addresses("acme", os.urandom(32))[0],
        model_id=MODEL_ID,
        codec=BF16,
        shape=SHAPES[EMBEDDING],
        image_size=Size(640, 480),
        input_size=Size(1024, 768),
        orientation=0,
    )
    values = torch.randn(SHAPES[EMBEDDING])
    await cache.put((header, values), ttl_s=60, wait_s=30)
    yield servicer, header, values
    await pipeline.close()
    await batcher.close()
    await cache.close()


async def download(servicer: EncoderServicer, key: str, tenant: str) -> list[pb.DownloadEmbeddingResponse]:
    current_call.set(Call(tenant=tenant, request_id="id", method="DownloadEmbedding"))
    return [reply async for reply in servicer.DownloadEmbedding(pb.DownloadEmbeddingRequest(embedding_key=key), None)]


async def test_a_download_names_the_codec_of_the_stored_numbers_not_of_the_settings(stored):
    servicer, header, values = stored
    replies = await download(servicer, header.address.key.hex(), "acme")
    payload = b"".join(reply.chunk for reply in replies)
    assert replies[0].header.codec == types_pb2.EMBEDDING_CODEC_BF16
    assert tuple(replies[0].header.shape) == SHAPES[EMBEDDING]
    assert replies[0].header.size_bytes == len(payload)
    assert payload == BF16.write(values)
    assert not any(reply.HasField("header") for reply in replies[1:])


async def test_another_tenants_embedding_cannot_be_downloaded(stored):
    servicer, header, _ = stored
    with pytest.raises(EmbeddingExpired):
        await download(servicer, header.address.key.hex(), "globex")


@pytest.mark.parametrize("key", ["", "0f" * 31, "0F" * 32])
async def test_a_key_that_is_none_is_refused_by_field(stored, key: str):
    with pytest.raises(InvalidArgument, match="embedding_key"):
        await download(stored[0], key, "acme")


async def test_a_stream_with_nonsense_in_it_is_refused_after_the_images_before(stored):
    async def requests():
        yield pb.EncodeImagesRequest(request_id=7, image=b"no image")
        raise InvalidArgument("request", "is not a message of this method")

    current_call.set(Call(tenant="acme", request_id="id", method="EncodeImages"))
    stream = stored[0].EncodeImages(requests(), None)
    answers = [await anext(stream)]
    with pytest.raises(InvalidArgument, match="not a message"):
        await anext(stream)
    assert [(answer.request_id, answer.error.reason) for answer in answers] == [(7, "INVALID_ARGUMENT")]
