"""EncoderService on the wire: parse, await, convert."""

import asyncio
import logging
from collections.abc import AsyncIterator

import grpc

from splitsam.common import tracing
from splitsam.common.batcher import Lane
from splitsam.common.calls import current_call
from splitsam.common.errors import InternalError, InvalidArgument, NotReady, ServiceError
from splitsam.common.keys import Crop
from splitsam.common.messages import ModelInfo, to_codec, to_embedding_info, to_item_error, to_limits, to_model_info
from splitsam.common.records import parse_key
from splitsam.encoder_service.pipeline import Encoded, EncodePipeline
from splitsam.encoder_service.settings import EncoderSettings
from splitsam.v1 import encoder_pb2 as pb
from splitsam.v1 import encoder_pb2_grpc

log = logging.getLogger("splitsam.encoder")
_CHUNK_BYTES = 2**20


class EncoderServicer(encoder_pb2_grpc.EncoderServiceServicer):
    """The RPCs of splitsam.v1.EncoderService; what they mean is documented in encoder.proto."""

    def __init__(self, settings: EncoderSettings):
        self._settings = settings
        self._loaded: tuple[EncodePipeline, ModelInfo] | None = None

    def load(self, pipeline: EncodePipeline, info: ModelInfo) -> None:
        """What answers from now on; before, the interceptor answers UNAVAILABLE."""
        self._loaded = (pipeline, info)

    @property
    def _pipeline(self) -> EncodePipeline:
        return self._parts[0]

    @property
    def _parts(self) -> tuple[EncodePipeline, ModelInfo]:
        if self._loaded is None:
            raise NotReady("the model is loading", retry_delay_s=1.0)
        return self._loaded

    async def EncodeImage(
        self, request: pb.EncodeImageRequest, context: grpc.aio.ServicerContext
    ) -> pb.EncodeImageResponse:
        call = current_call.get()
        lane = Lane.BULK if request.background else Lane.CLICK
        encoded = await self._pipeline.encode(call.tenant, request.image, lane, call.deadline_s, _crop_of(request))
        self._note(encoded)
        return _to_response(encoded)

    async def LookUpEmbedding(
        self, request: pb.LookUpEmbeddingRequest, context: grpc.aio.ServicerContext
    ) -> pb.LookUpEmbeddingResponse:
        tenant = current_call.get().tenant
        header = await self._pipeline.look_up(tenant, request.image_sha256, _crop_of(request))
        tracing.note({"splitsam.cache_hit": header is not None})
        if header is None:
            return pb.LookUpEmbeddingResponse(found=False)
        return pb.LookUpEmbeddingResponse(found=True, embedding=to_embedding_info(header))

    async def DownloadEmbedding(
        self, request: pb.DownloadEmbeddingRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.DownloadEmbeddingResponse]:
        key = parse_key(request.embedding_key)
        if key is None:
            raise InvalidArgument("embedding_key", "is not the 64 lower-case hex digits of a key")
        header, values = await self._pipeline.fetch(current_call.get().tenant, key)
        payload = await asyncio.to_thread(header.codec.write, values)
        first = pb.DownloadEmbeddingHeader(
            embedding=to_embedding_info(header),
            codec=to_codec(header.codec.name),
            shape=header.shape,
            size_bytes=len(payload),
        )
        for start in range(0, len(payload), _CHUNK_BYTES):
            chunk = bytes(payload[start : start + _CHUNK_BYTES])
            yield pb.DownloadEmbeddingResponse(header=first if start == 0 else None, chunk=chunk)

    async def EncodeImages(
        self, requests: AsyncIterator[pb.EncodeImagesRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.EncodeImagesResponse]:
        places = asyncio.Semaphore(self._settings.stream_window)  # taken on arrival, given back with the answer
        answers: asyncio.Queue[pb.EncodeImagesResponse | None] = asyncio.Queue()
        reader = asyncio.create_task(self._encode_all(requests, places, answers))
        try:
            while (answer := await answers.get()) is not None:
                yield answer
                places.release()
            await reader
        finally:
            reader.cancel()

    async def GetModelInfo(
        self, request: pb.EncoderServiceGetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.EncoderServiceGetModelInfoResponse:
        return pb.EncoderServiceGetModelInfoResponse(
            model=to_model_info(self._parts[1]), limits=to_limits(self._settings)
        )

    async def _encode_all(
        self,
        requests: AsyncIterator[pb.EncodeImagesRequest],
        places: asyncio.Semaphore,
        answers: "asyncio.Queue[pb.EncodeImagesResponse | None]",
    ) -> None:
        """Encode a stream's images as places come free; None ends the answers.

        Raises:
            InvalidArgument: something else than a request came; all images before it have been answered.
        """
        refusal = None
        try:
            async with asyncio.TaskGroup() as group:
                try:
                    async for request in requests:
                        await places.acquire()
                        group.create_task(self._encode_item(request, answers))
                        del request  # it would lie in memory until the next one comes
                except ServiceError as error:  # the group would wrap it, and cancel the images in work
                    refusal = error
        finally:
            answers.put_nowait(None)
        if refusal is not None:
            raise refusal

    async def _encode_item(
        self, request: pb.EncodeImagesRequest, answers: "asyncio.Queue[pb.EncodeImagesResponse | None]"
    ) -> None:
        """One image of a stream; its failure is its own answer and never the stream's end."""
        answer = pb.EncodeImagesResponse(request_id=request.request_id)
        try:
            call = current_call.get()
            with tracing.step("encode item", {"splitsam.item": request.request_id}):
                encoded = await self._pipeline.encode(call.tenant, request.image, Lane.BULK, call.deadline_s)
                self._note(encoded)
            answer.result.CopyFrom(_to_response(encoded))
        except ServiceError as error:
            answer.error.CopyFrom(to_item_error(error))
        except Exception:
            log.exception("an image of a stream failed", extra={"item": request.request_id})
            answer.error.CopyFrom(to_item_error(InternalError("internal error; the server's log has the details")))
        answers.put_nowait(answer)

    def _note(self, encoded: Encoded) -> None:
        model_id = self._parts[1].model_id
        about = {"splitsam.cache_hit": encoded.cache_hit, "splitsam.stored": encoded.stored}
        tracing.note({"splitsam.model_id": model_id, "splitsam.images": 1, **about})


def _crop_of(request: pb.EncodeImageRequest | pb.LookUpEmbeddingRequest) -> Crop | None:
    crop = request.crop
    return (crop.x0, crop.y0, crop.x1, crop.y1) if request.HasField("crop") else None


def _to_response(encoded: Encoded) -> pb.EncodeImageResponse:
    timings = encoded.timings
    return pb.EncodeImageResponse(
        embedding=to_embedding_info(encoded.header),
        cache_hit=encoded.cache_hit,
        stored=encoded.stored,
        timings=pb.EncodeTimings(
            cache_ms=timings.cache_ms,
            preprocess_ms=timings.preprocess_ms,
            queue_ms=timings.queue_ms,
            model_ms=timings.model_ms,
            store_ms=timings.store_ms,
        ),
    )
