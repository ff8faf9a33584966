"""Our types as protobuf messages that both services send: model info, limits, sizes, errors inside streams."""

from dataclasses import dataclass
from importlib.metadata import version

from splitsam.common.errors import ServiceError
from splitsam.common.records import RecordHeader, Size
from splitsam.common.settings import ServiceSettings
from splitsam.common.shapes import IMAGE_FORMATS
from splitsam.v1 import encoder_pb2, types_pb2


@dataclass(frozen=True)
class ModelInfo:
    """The model in use.

    Args:
        model_id: 64 hex digits.
        demonstration: True for the shipped vit_t.
        precision: as in the setting, `auto` resolved.
        device: for people.
        codec: fp16 or bf16; empty in a decoder, which reads both.
        preprocess_version: empty in a decoder.
        notes: what was skipped or replaced at start, and why.
    """

    name: str
    model_id: str
    demonstration: bool
    precision: str
    device: str
    codec: str = ""
    preprocess_version: str = ""
    notes: tuple[str, ...] = ()


def to_model_info(info: ModelInfo) -> types_pb2.ModelInfo:
    return types_pb2.ModelInfo(
        name=info.name,
        model_id=info.model_id,
        demonstration=info.demonstration,
        precision=f"PRECISION_{info.precision.upper()}",
        device=info.device,
        codec=to_codec(info.codec) if info.codec else None,
        preprocess_version=info.preprocess_version,
        server_version=version("splitsam"),
        notes=info.notes,
    )


def to_codec(codec: str) -> str:
    """The enum value's name, which protobuf takes for the value."""
    return f"EMBEDDING_CODEC_{codec.upper()}"


def to_limits(settings: ServiceSettings) -> types_pb2.Limits:
    return types_pb2.Limits(
        max_image_bytes=settings.max_image_bytes,
        max_image_pixels=settings.max_image_pixels,
        max_images_per_request=settings.max_images_per_request,
        max_prompts_per_request=settings.max_prompts_per_request,
        max_points_per_prompt=settings.max_points_per_prompt,
        max_reply_bytes=settings.max_reply_bytes,
        image_formats=IMAGE_FORMATS,
        max_crop_layers=settings.max_crop_layers,
        max_points_per_search=settings.max_points_per_search,
    )


def to_size(size: Size) -> types_pb2.ImageSize:
    return types_pb2.ImageSize(width=size.width, height=size.height)


def to_embedding_info(header: RecordHeader) -> encoder_pb2.EmbeddingInfo:
    return encoder_pb2.EmbeddingInfo(
        embedding_key=header.address.key.hex(),
        image_size=to_size(header.image_size),
        input_size=to_size(header.input_size),
        orientation=types_pb2.Orientation.Name(header.orientation),
        model_id=header.model_id,
    )


def to_item_error(error: ServiceError) -> types_pb2.ItemError:
    """An error inside a stream, with what a status would have carried."""
    return types_pb2.ItemError(
        code=error.code.value[0],
        reason=error.reason,
        message=error.message,
        field_violations=[
            types_pb2.ItemFieldViolation(field=violation.field, description=violation.description)
            for violation in error.violations
        ],
        retry_delay_ms=round((error.retry_delay_s or 0) * 1000),
    )
