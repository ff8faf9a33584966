"""What a deployment may set on the gateway."""

import ssl
from pathlib import Path
from typing import Annotated, Any, Self

import certifi
from pydantic import Field, field_validator, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from splitsam.client.async_client import AsyncClient
from splitsam.client.connection import DEFAULT_DECODER, DEFAULT_ENCODER, TLS, Connection, connection
from splitsam.common.settings import Port, ProcessSettings, SettingsProblem
from splitsam.gateway.addresses import BadAddress, parse_target

Words = Annotated[tuple[str, ...], NoDecode]


class GatewaySettings(ProcessSettings):
    """Settings of the gateway; environment variables begin with SPLITSAM_GATEWAY_. Lists are separated by commas."""

    model_config = SettingsConfigDict(env_prefix="SPLITSAM_GATEWAY_", cli_prog_name="splitsam gateway")

    port: Port = Field(8080, description="HTTP port; 0 picks a free one")
    allowed_origins: Words = Field(
        (), description="Origins of pages elsewhere that may call, e.g. https://tool.example; others are refused"
    )
    max_connections: int = Field(1000, ge=1, le=100_000, description="Connections at once; more are answered 503")
    caller_requests_per_s: float = Field(
        0, ge=0, le=10**6, description="Requests of one caller a second, by the name of its token; 0: no limit"
    )
    caller_requests_in_flight: int = Field(
        0, ge=0, description="Requests and pointers of one caller at once; 0: no limit"
    )
    quotas_file: Path | None = Field(
        None, description="File with lines 'caller requests_per_s requests_in_flight', instead of those two"
    )
    max_image_bytes: int = Field(32 * 2**20, ge=1, le=2**30, description="Bytes of one image file")
    max_images_in_work: int = Field(
        16, ge=1, le=1024, description="Images in memory at once, some five times their size each; others wait"
    )
    image_wait_ms: int = Field(10_000, ge=0, le=600_000, description="Longest wait to be one of them")
    upload_timeout_ms: int = Field(60_000, ge=10, le=3_600_000, description="Longest wait for the bytes of a request")

    encoders: Words = Field((DEFAULT_ENCODER,), min_length=1, description="host:port of the encoder service's replicas")
    decoders: Words = Field((DEFAULT_DECODER,), min_length=1, description="host:port of the decoder service's replicas")
    service_token_file: Path | None = Field(None, description="File with the bearer token to send to the services")
    service_tls: bool = Field(False, description="Use TLS towards them; implied by the four settings below")
    service_ca_file: Path | None = Field(None, description="Authorities to trust there, PEM; unset: the system's")
    service_cert_file: Path | None = Field(None, description="Certificate to show there, PEM, for mutual TLS")
    service_key_file: Path | None = Field(None, description="That certificate's key, PEM")
    service_server_name: str | None = Field(None, description="Name in their certificates, if not that of the address")
    encode_timeout_ms: int = Field(60_000, ge=100, le=600_000, description="Longest time for one image")
    predict_timeout_ms: int = Field(30_000, ge=10, le=600_000, description="Longest time for one click")

    image_hosts: Words = Field(
        (), description="Hosts that images are fetched from: host, host:port or *.domain; none by default"
    )
    private_images: bool = Field(False, description="Let those be in private networks, or this machine")
    fetch_timeout_ms: int = Field(10_000, ge=10, le=600_000, description="Longest time to fetch one image")
    fetch_ca_file: Path | None = Field(None, description="Authorities of those hosts, PEM; unset: the well-known ones")
    label_studio_url: str | None = Field(
        None, description="Label Studio, whose images are fetched wherever it is, e.g. http://label-studio:8080"
    )
    label_studio_token_file: Path | None = Field(None, description="File with a token of a user of Label Studio")

    remember_images_ms: int = Field(
        600_000, ge=0, le=86_400_000, description="How long a task's image is not fetched again for the next click"
    )
    encode_ahead: int = Field(
        1000, ge=0, le=100_000, description="Images of a project encoded when Label Studio sets it up; 0: none"
    )
    encode_ahead_in_flight: int = Field(2, ge=1, le=64, description="Such images at once")

    @field_validator("allowed_origins", "encoders", "decoders", "image_hosts", mode="before")
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        return tuple(word for word in value.split(",") if word) if isinstance(value, str) else value

    @field_validator("label_studio_url")
    @classmethod
    def _is_an_origin(cls, url: str | None) -> str | None:
        if url is not None:
            try:
                parse_target(url)
            except BadAddress as error:
                raise ValueError(str(error)) from None
        return url

    @model_validator(mode="after")
    def _service_tls_needs_a_pair(self) -> Self:
        if (self.service_cert_file is None) != (self.service_key_file is None):
            raise ValueError("service_cert_file and service_key_file need each other")
        return self

    @model_validator(mode="after")
    def _shares_need_names(self) -> Self:
        # Not by address: behind an ingress all callers have one, and the ingress knows their own.
        if self.tokens_file is None and (
            self.caller_requests_per_s or self.caller_requests_in_flight or self.quotas_file is not None
        ):
            raise ValueError(
                "caller_requests_per_s, caller_requests_in_flight and quotas_file need tokens_file: "
                "nothing else tells callers apart"
            )
        return self

    @property
    def label_studio_origin(self) -> str | None:
        return None if self.label_studio_url is None else parse_target(self.label_studio_url).origin

    def fetch_tls(self) -> ssl.SSLContext:
        """Whom to trust when images are fetched.

        Raises:
            SettingsProblem: the file of authorities cannot be used.
        """
        try:
            return ssl.create_default_context(cafile=self.fetch_ca_file or certifi.where())
        except (OSError, ssl.SSLError) as error:
            raise SettingsProblem(f"fetch_ca_file: {error}") from error

    def check_files(self) -> None:
        """Raises SettingsProblem where a file cannot be read, before anything needs it."""
        read_secret("service_token_file", self.service_token_file)
        read_secret("label_studio_token_file", self.label_studio_token_file)
        try:
            if (tls := self._service_tls()) is not None:
                tls.credentials()
        except OSError as error:
            raise SettingsProblem(f"service_ca_file, service_cert_file, service_key_file: {error}") from error

    def open_client(self) -> AsyncClient:
        """A client of the services, for the running event loop."""
        return AsyncClient(
            self.encoders,
            self.decoders,
            token=read_secret("service_token_file", self.service_token_file),
            tls=self._service_tls(),
            encode_timeout_s=self.encode_timeout_ms / 1000,
            predict_timeout_s=self.predict_timeout_ms / 1000,
        )

    def service_connection(self) -> Connection:
        """Where the services are and how to call what takes no token."""
        return connection(self.encoders, self.decoders, tls=self._service_tls())

    def _service_tls(self) -> TLS | None:
        files = (self.service_ca_file, self.service_cert_file, self.service_key_file)
        tls = TLS(*files, self.service_server_name)
        return tls if self.service_tls or tls != TLS() else None


def read_secret(setting: str, path: Path | None) -> str | None:
    """The one word in a file; None without one.

    Raises:
        SettingsProblem: the file is missing, or holds anything else.
    """
    if path is None:
        return None
    try:
        words = path.read_text(encoding="utf-8").split()
    except UnicodeDecodeError:  # its text would show what was read
        raise SettingsProblem(f"{setting}: not a text file") from None
    except OSError as error:
        raise SettingsProblem(f"{setting}: {error}") from error
    if len(words) != 1:
        raise SettingsProblem(f"{setting}: needs one word, the token, and holds {len(words)}")
    return words[0]
