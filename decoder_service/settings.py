"""What a deployment may set on the decoder service."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from splitsam.common.settings import Port, ServiceSettings


class DecoderSettings(ServiceSettings):
    """Settings of the decoder service; environment variables begin with SPLITSAM_DECODER_."""

    model_config = SettingsConfigDict(env_prefix="SPLITSAM_DECODER_", cli_prog_name="splitsam serve-decoder")

    port: Port = Field(50052, description="gRPC port; 0 picks a free one")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="Numbers the mask decoder computes in")
    kernels: bool = Field(True, description="On a GPU, use our Triton kernels, and in bf16 CUDA graphs")
    max_batch_prompts: int = Field(256, ge=1, le=65_536, description="Prompts in one batch on a GPU")
    cpu_batch_prompts: int = Field(4, ge=1, le=1024, description="Prompts in one batch on a CPU, where large ones cost")
    prompts_per_forward: int = Field(128, ge=1, le=4096, description="Prompts in one model call on a GPU")
    max_wait_ms: float = Field(0.0, ge=0, le=1000, description="How long an idle worker holds a batch back")
    format_threads: int = Field(2, ge=1, le=256, description="Threads that write masks in the formats asked for")
    memory_bytes: int = Field(
        512 * 2**20, ge=0, le=2**40, description="Embeddings kept on the device, 10 MiB each in fp32"
    )
    logits_memory_bytes: int = Field(64 * 2**20, ge=0, le=2**40, description="Refinement logits kept in memory")
    embedding_ttl_s: int = Field(86_400, ge=1, le=10**8, description="Life of an unused embedding in the cache")
    refinement_ttl_s: int = Field(600, ge=1, le=10**6, description="Life of a refinement token, in seconds")
    encoder_address: str | None = Field(
        None,
        min_length=1,
        description="host:port of the encoder, for GenerateMasks of images; unset: not served",
    )
    encoder_tls: bool = Field(False, description="Use TLS towards it; implied by the four settings below")
    encoder_ca_file: Path | None = Field(None, description="Authorities to trust there, PEM; unset: the system's")
    encoder_cert_file: Path | None = Field(None, description="Certificate to show there, PEM, for mutual TLS")
    encoder_key_file: Path | None = Field(None, description="That certificate's key, PEM")
    encoder_server_name: str | None = Field(None, description="Name in its certificate, if not that of the address")
    encode_timeout_ms: int = Field(60_000, ge=100, le=600_000, description="Longest wait for it to encode a crop")
    predict_timeout_ms: int = Field(30_000, ge=10, le=600_000, description="Longest time for one PredictMasks")

    @model_validator(mode="after")
    def _encoder_tls_needs_a_pair(self) -> Self:
        if (self.encoder_cert_file is None) != (self.encoder_key_file is None):
            raise ValueError("encoder_cert_file and encoder_key_file need each other")
        return self
