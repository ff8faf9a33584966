"""What a deployment may set on the encoder service."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from splitsam.common.settings import Port, ServiceSettings
from splitsam.encoder_service.preprocess import ImageLimits

BatchSize = Annotated[int, Field(ge=1, le=1024)]


class EncoderSettings(ServiceSettings):
    """Settings of the encoder service; environment variables begin with SPLITSAM_ENCODER_."""

    model_config = SettingsConfigDict(env_prefix="SPLITSAM_ENCODER_", cli_prog_name="splitsam serve-encoder")

    port: Port = Field(50051, description="gRPC port; 0 picks a free one")
    precision: Literal["fp32", "bf16", "fp8", "int8", "int8_sparse", "seed", "auto"] = Field(
        "fp32", description="Numbers the image encoder computes in; auto: the fastest known to keep the masks"
    )
    codec: Literal["fp16", "bf16", "int8"] = Field(
        "fp16", description="Numbers an embedding is stored in; int8 is half as large"
    )
    batch_sizes: Annotated[tuple[BatchSize, ...], NoDecode] = Field(
        (1, 4, 16), min_length=1, description="Sizes of batches on a GPU; a CPU takes one image"
    )
    max_wait_ms: float = Field(2.0, ge=0, le=1000, description="How long an idle GPU holds an unfilled batch back")
    decode_threads: int = Field(2, ge=1, le=256, description="Threads that decode and resize images")
    decode_processes: int = Field(0, ge=0, le=256, description="Processes that do it in their place; 0: threads do")
    jpeg_decoder: Literal["pillow", "nvjpeg"] = Field(
        "pillow", description="Who decodes JPEGs; nvjpeg: the GPU, plain ones, through torchvision"
    )
    stream_window: int = Field(8, ge=1, le=256, description="Images of one EncodeImages stream in work at once")
    embedding_ttl_s: int = Field(86_400, ge=1, le=10**8, description="Life of an unused embedding in the cache")
    encode_timeout_ms: int = Field(60_000, ge=100, le=600_000, description="Longest time for one encode and its claim")
    claim_wait_ms: int = Field(5_000, ge=0, le=60_000, description="Longest wait for another replica's encode")

    def image_limits(self) -> ImageLimits:
        return ImageLimits(max_bytes=self.max_image_bytes, max_pixels=self.max_image_pixels)

    @field_validator("batch_sizes", mode="before")
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value
