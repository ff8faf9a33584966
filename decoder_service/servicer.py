"""DecoderService on the wire: parse, await, convert."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass

import grpc

from splitsam.common import tracing
from splitsam.common.calls import current_call
from splitsam.common.errors import InternalError, NotReady, ServiceError
from splitsam.common.messages import ModelInfo, to_item_error, to_limits, to_model_info
from splitsam.decoder_service.embeddings import EmbeddingStore
from splitsam.decoder_service.everything import Everything
from splitsam.decoder_service.everything_messages import (
    SearchLimits,
    build_everything,
    parse_everything,
    parse_origin,
)
from splitsam.decoder_service.everything_request import count_points
from splitsam.decoder_service.messages import build_response, parse_request
from splitsam.decoder_service.pointer import Newest
from splitsam.decoder_service.predictor import Predictor
from splitsam.decoder_service.prompts import PromptLimits, validate_key
from splitsam.decoder_service.settings import DecoderSettings
from splitsam.decoder_service.sources import Sources
from splitsam.v1 import decoder_pb2 as pb
from splitsam.v1 import decoder_pb2_grpc

log = logging.getLogger("splitsam.decoder")
# Answers a stream may owe its client before its requests are no longer read.
_STREAM_ANSWERS = 64


@dataclass(frozen=True)
class Parts:
    """What the servicer hands requests to."""

    predictor: Predictor
    everything: Everything
    embeddings: EmbeddingStore
    sources: Sources
    info: ModelInfo


class DecoderServicer(decoder_pb2_grpc.DecoderServiceServicer):
    """The RPCs of splitsam.v1.DecoderService; what they mean is documented in decoder.proto."""

    def __init__(self, settings: DecoderSettings):
        self._settings = settings
        self._limits = PromptLimits(
            max_images=settings.max_images_per_request,
            max_prompts=settings.max_prompts_per_request,
            max_points=settings.max_points_per_prompt,
        )
        self._search_limits = SearchLimits(
            max_image_bytes=settings.max_image_bytes,
            max_crop_layers=settings.max_crop_layers,
            max_grid_points=settings.max_prompts_per_request,
            max_points=settings.max_points_per_search,
        )
        self._loaded: Parts | None = None

    def load(self, parts: Parts) -> None:
        """What answers from now on; before, the interceptor answers UNAVAILABLE."""
        self._loaded = parts

    @property
    def _parts(self) -> Parts:
        if self._loaded is None:
            raise NotReady("the model is loading", retry_delay_s=1.0)
        return self._loaded

    async def PredictMasks(
        self, request: pb.PredictMasksRequest, context: grpc.aio.ServicerContext
    ) -> pb.PredictMasksResponse:
        return await self._predict(request, context.time_remaining())

    async def PredictMasksStream(
        self, requests: AsyncIterator[pb.PredictMasksStreamRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.PredictMasksStreamResponse]:
        newest: Newest[pb.PredictMasksStreamRequest] = Newest()
        answers: asyncio.Queue[pb.PredictMasksStreamResponse | None] = asyncio.Queue(_STREAM_ANSWERS)
        room = asyncio.Semaphore(1)  # for one answer with masks: whoever does not read costs no more memory
        reader = asyncio.create_task(self._read_pointer(requests, newest, answers))
        worker = asyncio.create_task(self._follow_pointer(newest, answers, room))
        try:
            while (answer := await answers.get()) is not None:
                yield answer
                if not answer.HasField("superseded"):
                    room.release()
            await reader
        finally:
            reader.cancel()
            worker.cancel()
            # Both are over before the interceptor empties the frames that a refusal went through.
            await asyncio.gather(reader, worker, return_exceptions=True)

    async def GenerateMasks(
        self, request: pb.GenerateMasksRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateMasksResponse]:
        call, everything = current_call.get(), self._parts.everything
        origin = parse_origin(request, self._search_limits)
        parsed = parse_everything(request, self._search_limits)
        self._note(images=1, prompts=count_points(parsed.grids))
        async with (
            self._parts.sources.open(call, origin) as source,
            aclosing(everything.generate(call.tenant, source, parsed, call.deadline_s)) as masks,
        ):
            async for mask in masks:
                yield build_everything(mask)

    async def PrefetchEmbedding(
        self, request: pb.PrefetchEmbeddingRequest, context: grpc.aio.ServicerContext
    ) -> pb.PrefetchEmbeddingResponse:
        validate_key(request.embedding_key, "embedding_key")
        key = bytes.fromhex(request.embedding_key)
        was_resident = await self._parts.embeddings.prefetch(current_call.get().tenant, key)
        return pb.PrefetchEmbeddingResponse(was_resident=was_resident)

    async def GetModelInfo(
        self, request: pb.DecoderServiceGetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.DecoderServiceGetModelInfoResponse:
        return pb.DecoderServiceGetModelInfoResponse(
            model=to_model_info(self._parts.info), limits=to_limits(self._settings)
        )

    def _note(self, *, images: int, prompts: int) -> None:
        model_id = self._parts.info.model_id
        tracing.note({"splitsam.model_id": model_id, "splitsam.images": images, "splitsam.prompts": prompts})

    async def _predict(self, request: pb.PredictMasksRequest, remaining_s: float | None) -> pb.PredictMasksResponse:
        parsed = parse_request(request, self._limits)
        prompts = sum(len(image.prompts) for image in parsed.images)
        self._note(images=len(parsed.images), prompts=prompts)
        wait_s = self._settings.predict_timeout_ms / 1000
        deadline_s = time.monotonic() + (wait_s if remaining_s is None else min(wait_s, remaining_s))
        images, timings = await self._parts.predictor.predict(current_call.get().tenant, parsed, deadline_s)
        return build_response(images, timings, self._settings.max_reply_bytes)

    async def _read_pointer(
        self,
        requests: AsyncIterator[pb.PredictMasksStreamRequest],
        newest: Newest[pb.PredictMasksStreamRequest],
        answers: "asyncio.Queue[pb.PredictMasksStreamResponse | None]",
    ) -> None:
        try:
            async for request in requests:
                old = newest.offer(request)
                if old is not None:
                    superseded = pb.Superseded(by_request_id=request.request_id)
                    await answers.put(pb.PredictMasksStreamResponse(request_id=old.request_id, superseded=superseded))
        finally:
            newest.end()

    async def _follow_pointer(
        self,
        newest: Newest[pb.PredictMasksStreamRequest],
        answers: "asyncio.Queue[pb.PredictMasksStreamResponse | None]",
        room: asyncio.Semaphore,
    ) -> None:
        """Serve one request at a time, always the newest; None ends the answers."""
        while await room.acquire() and (request := await newest.take()) is not None:
            answer = pb.PredictMasksStreamResponse(request_id=request.request_id)
            try:
                with tracing.step("pointer position"):
                    answer.result.CopyFrom(await self._predict(request.request, None))
            except ServiceError as error:
                answer.error.CopyFrom(to_item_error(error))
            except Exception:
                log.exception("a request of a stream failed", extra={"item": request.request_id})
                answer.error.CopyFrom(to_item_error(InternalError("internal error; the server's log has the details")))
            await answers.put(answer)
        await answers.put(None)
