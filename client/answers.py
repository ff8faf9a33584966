"""Protobuf answers turned into the client's results."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from splitsam.client.errors import error_from_item
from splitsam.client.names import Address
from splitsam.client.results import (
    Embedding,
    EncodedImage,
    EncodeTimings,
    FoundMask,
    ImageMasks,
    ImageSource,
    Mask,
    PointerAnswer,
    Polygon,
    PredictTimings,
    ServiceInfo,
)
from splitsam.v1 import decoder_pb2, encoder_pb2, types_pb2

_NOT_RUN = encoder_pb2.EncodeTimings()


def encoded_image(
    info: encoder_pb2.EmbeddingInfo,
    source: ImageSource | None,
    sha256: bytes,
    *,
    cache_hit: bool,
    stored: bool,
    timings: encoder_pb2.EncodeTimings = _NOT_RUN,
) -> EncodedImage:
    """The handle of an image that is encoded."""
    return EncodedImage(
        key=info.embedding_key,
        width_px=info.image_size.width,
        height_px=info.image_size.height,
        input_width_px=info.input_size.width,
        input_height_px=info.input_size.height,
        exif_orientation=info.orientation or None,
        model_id=info.model_id,
        cache_hit=cache_hit,
        stored=stored,
        timings=EncodeTimings(
            timings.cache_ms, timings.preprocess_ms, timings.queue_ms, timings.model_ms, timings.store_ms
        ),
        sha256=sha256,
        source=source,
    )


def image_masks(response: decoder_pb2.PredictMasksResponse) -> list[ImageMasks]:
    """The masks of every image of one request, in its order."""
    timings = response.timings
    return [
        ImageMasks(
            key=image.embedding_key,
            width_px=image.image_size.width,
            height_px=image.image_size.height,
            exif_orientation=image.orientation or None,
            prompts=[[_mask(mask, image.image_size) for mask in prompt.masks] for prompt in image.prompts],
            timings=PredictTimings(timings.fetch_ms, timings.queue_ms, timings.model_ms, timings.format_ms),
        )
        for image in response.images
    ]


def found_mask(response: decoder_pb2.GenerateMasksResponse) -> FoundMask:
    """One mask of everything mode."""
    point, crop = response.point, response.crop
    mask = _mask(response.mask, response.image_size)
    return FoundMask(mask, (point.x, point.y), (crop.x0, crop.y0, crop.x1, crop.y1), response.embedding_key)


def pointer_answer(response: decoder_pb2.PredictMasksStreamResponse) -> PointerAnswer:
    """What became of one position of a pointer."""
    match response.WhichOneof("outcome"):
        case "result":
            return PointerAnswer(response.request_id, masks=image_masks(response.result)[0].prompts[0])
        case "superseded":
            return PointerAnswer(response.request_id, superseded_by=response.superseded.by_request_id)
        case _:
            return PointerAnswer(response.request_id, error=error_from_item(response.error))


def embedding(messages: Sequence[encoder_pb2.DownloadEmbeddingResponse]) -> Embedding:
    """Join the chunks of a download."""
    header = messages[0].header if messages else encoder_pb2.DownloadEmbeddingHeader()
    content = b"".join(message.chunk for message in messages)
    if not content or len(content) != header.size_bytes:
        raise ValueError(f"the download has {len(content)} of {header.size_bytes} bytes")
    info = header.embedding
    return Embedding(
        key=info.embedding_key,
        model_id=info.model_id,
        codec=_codec(header.codec),
        width_px=info.image_size.width,
        height_px=info.image_size.height,
        input_width_px=info.input_size.width,
        input_height_px=info.input_size.height,
        values=widen(content, header.codec, tuple(header.shape)),
    )


def service_info(
    service: str,
    address: Address,
    response: encoder_pb2.EncoderServiceGetModelInfoResponse | decoder_pb2.DecoderServiceGetModelInfoResponse,
) -> ServiceInfo:
    """The model and limits of one service."""
    model = response.model
    limits = response.limits
    return ServiceInfo(
        service=service,
        address=address.place,
        model=model.name,
        model_id=model.model_id,
        demonstration=model.demonstration,
        precision=_precision(model.precision),
        device=model.device,
        codec=_codec(model.codec),
        preprocess_version=model.preprocess_version,
        server_version=model.server_version,
        notes=tuple(model.notes),
        limits={
            field.name: list(value) if field.is_repeated else value
            for field in limits.DESCRIPTOR.fields
            for value in (getattr(limits, field.name),)
        },
    )


def read_source(source: ImageSource) -> bytes:
    """The bytes of an image file, given as bytes or as a path.

    Raises:
        OSError: the file cannot be read.
    """
    return source if isinstance(source, bytes) else Path(source).read_bytes()


def _mask(mask: decoder_pb2.PredictedMask, size: types_pb2.ImageSize) -> Mask:
    box = mask.box
    has_polygons = mask.HasField("polygons")
    return Mask(
        index=mask.mask_index,
        score=mask.predicted_iou,
        stability=mask.stability_score,
        area_px=mask.area_px,
        box=(box.x0, box.y0, box.x1, box.y1) if mask.HasField("box") else None,
        width_px=size.width,
        height_px=size.height,
        rle={"size": list(mask.rle.size), "counts": mask.rle.counts} if mask.HasField("rle") else None,
        png=mask.png or None,
        polygons=tuple(_polygon(polygon) for polygon in mask.polygons.polygons) if has_polygons else None,
        bits=mask.bits or None,
        low_res_logits=mask.low_res_logits or None,
        refinement_token=mask.refinement_token or None,
    )


def _polygon(polygon: decoder_pb2.Polygon) -> Polygon:
    return Polygon(_ring(polygon.outer), tuple(_ring(hole) for hole in polygon.holes))


def _ring(ring: decoder_pb2.Ring) -> NDArray[np.float32]:
    return np.array(ring.xy, np.float32).reshape(-1, 2)


def widen(content: bytes, codec: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The numbers of a download: [C, H, W].

    Args:
        codec: of EmbeddingCodec.

    Raises:
        ValueError: a newer server's codec.
    """
    if codec == types_pb2.EMBEDDING_CODEC_FP16:
        return np.frombuffer(content, "<f2").astype(np.float32).reshape(shape)
    if codec == types_pb2.EMBEDDING_CODEC_BF16:
        return (np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    if codec == types_pb2.EMBEDDING_CODEC_INT8:
        scales = np.frombuffer(content, "<f4", count=shape[0]).reshape(-1, 1, 1)
        wide: NDArray[np.float32] = np.frombuffer(content, np.int8, offset=scales.nbytes).reshape(shape) * scales
        return wide
    raise ValueError(f"this client does not know the embedding codec {codec}")


def _precision(value: int) -> str:
    return types_pb2.Precision.Name(value).removeprefix("PRECISION_").lower()


def _codec(value: int) -> str:
    return types_pb2.EmbeddingCodec.Name(value).removeprefix("EMBEDDING_CODEC_").lower()
