"""Annotators who click in turn at a given rate, by calls or on streams, on embeddings that nobody has computed."""

import asyncio
import hashlib
import time
from collections.abc import Sequence
from typing import Any, Self

import grpc.aio
import torch

from bench.calls import open_channel
from bench.load.crowd import DEADLINE_S, OK, Outcome
from bench.load.streams import ClickStream
from bench.loop.decoder import IMAGE_SIZE
from bench.loop.rows import STREAMS
from splitsam.client.errors import SplitsamError, error_from_rpc
from splitsam.common.auth import DEFAULT_TENANT
from splitsam.common.cache import RecordCache
from splitsam.common.codecs import FP16
from splitsam.common.keys import EncodingVersion, KeyRing
from splitsam.common.metrics import Metrics
from splitsam.common.records import EMBEDDING, SHAPES, RecordHeader, Size
from splitsam.v1 import decoder_pb2, decoder_pb2_grpc

IMAGES = 16
_ANNOTATORS_PER_CHANNEL = 16
_CLICKS_PER_OBJECT = 8
_INPUT_SIZE = Size(1024, 576)
_KEPT_S = 3600
_REDIS_TIMEOUT_MS = 10_000


async def store_images(redis_url: str, secret: bytes, decoder: str) -> list[str]:
    """Put embeddings of noise into Redis, as an encoder would, for the model that a decoder serves; their keys."""
    async with open_channel(decoder) as channel:
        stub = decoder_pb2_grpc.DecoderServiceStub(channel)
        info = await stub.GetModelInfo(decoder_pb2.DecoderServiceGetModelInfoRequest(), timeout=60)
    model_id = info.model.model_id
    keys, version = KeyRing([secret]), EncodingVersion(model_id, "bench.loop", "fp32", "fp16")
    cache = RecordCache(redis_url, timeout_ms=_REDIS_TIMEOUT_MS, connections=1, metrics=Metrics())
    stored = []
    for number in range(IMAGES):
        digest = hashlib.sha256(number.to_bytes(4, "big")).digest()
        [address] = keys.embedding_addresses(DEFAULT_TENANT, digest, version)
        shape = SHAPES[EMBEDDING]
        header = RecordHeader(EMBEDDING, address, model_id, FP16, shape, IMAGE_SIZE, _INPUT_SIZE, 0)
        await cache.put((header, torch.randn(shape)), ttl_s=_KEPT_S)
        stored.append(address.key.hex())
    await cache.close()
    return stored


class Annotators:
    """Each works on one image: a point begins an object, the next ones refine it with the token of the last answer.

    Args:
        decoder: host:port.
        keys: of embeddings.
        count: of annotators; some share a connection, none a stream.
    """

    def __init__(self, decoder: str, keys: Sequence[str], count: int, way: str):
        self._keys = keys
        self._count = count
        self._way = way
        channels = -(-count // _ANNOTATORS_PER_CHANNEL)
        self._channels = [open_channel(decoder) for _ in range(channels)]
        stubs = [decoder_pb2_grpc.DecoderServiceStub(channel) for channel in self._channels]
        self._stubs = [stubs[number % channels] for number in range(count)]
        self._streams: list[ClickStream] = []
        self._tokens: dict[int, str] = {}

    async def __aenter__(self) -> Self:
        if self._way == STREAMS:
            self._streams = [ClickStream(stub) for stub in self._stubs]
        return self

    async def __aexit__(self, *_error: object) -> None:
        for stream in self._streams:
            await stream.close()
        for channel in self._channels:
            await channel.close()

    async def warm_up(self) -> None:
        """A click of each, one after the other: then embeddings are resident and connections open.

        Raises:
            RuntimeError: one was not answered.
        """
        for number in range(self._count):
            outcome = await self._click(number, time.monotonic(), 0.0)
            if outcome.reason != OK:
                raise RuntimeError(f"a first click was not answered: {outcome.reason}")

    async def click(self, rate_s: float, seconds: float) -> list[Outcome]:
        """Click at even intervals, in turn, however many are unanswered; all have ended on return."""
        start_s = time.monotonic()
        tasks = []
        for number in range(round(rate_s * seconds)):
            at_s = number / rate_s
            await asyncio.sleep(max(0.0, start_s + at_s - time.monotonic()))
            tasks.append(asyncio.create_task(self._click(number, start_s + at_s, at_s)))
        return list(await asyncio.gather(*tasks))

    async def _click(self, number: int, due_s: float, at_s: float) -> Outcome:
        reason, retry_s = OK, None
        try:
            await self._send(number % self._count, begins=number // self._count % _CLICKS_PER_OBJECT == 0)
        except (grpc.aio.AioRpcError, SplitsamError) as problem:
            error = problem if isinstance(problem, SplitsamError) else error_from_rpc(problem, "")
            reason, retry_s = error.reason, error.retry_delay_s
        return Outcome("click", at_s, (time.monotonic() - due_s) * 1000, reason, retry_s)

    async def _send(self, annotator: int, *, begins: bool) -> None:
        point = decoder_pb2.Point(x=annotator % IMAGE_SIZE.width, y=10, label=decoder_pb2.POINT_LABEL_FOREGROUND)
        prompt = decoder_pb2.Prompt(points=[point])
        if not begins and annotator in self._tokens:
            prompt.refinement_token = self._tokens[annotator]
        key = self._keys[annotator % len(self._keys)]
        request = decoder_pb2.PredictMasksRequest(
            images=[decoder_pb2.ImagePrompts(embedding_key=key, prompts=[prompt])],
            output=decoder_pb2.OutputOptions(selection=decoder_pb2.MASK_SELECTION_BEST, refinement_tokens=True),
        )
        answer: Any
        if self._streams:
            answer = await self._streams[annotator].click(request, DEADLINE_S["click"])
        else:
            answer = await self._stubs[annotator].PredictMasks(request, timeout=DEADLINE_S["click"])
        self._tokens[annotator] = answer.images[0].prompts[0].masks[0].refinement_token
