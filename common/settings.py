"""What a deployment may set: defaults < environment < command line, checked once at start, then frozen."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from splitsam.common.errors import StartProblem
from splitsam.common.fair_queue import Lane
from splitsam.common.keys import KeyRing
from splitsam.common.redis_client import parse_place

Port = Annotated[int, Field(ge=0, le=65535)]

# Where no tenants are configured there is nobody to keep apart, and the keys need no secrecy.
_SINGLE_TENANT_SECRET = b"splitsam-single-tenant"
# Room in a message around the largest image: field tags and a stream's request id.
_MESSAGE_OVERHEAD_BYTES = 2**16
_DEVICE = r"^(auto|cpu|cuda(:(0|[1-9][0-9]?))?)$"  # what torch reads: no other digits, no zeros in front
DEFAULT_CACHE_DIR = Path.home() / ".cache" / "splitsam"


class SettingsProblem(StartProblem):
    """A setting is unknown or out of range; the message names it."""


def _check_redis_url(url: str) -> None:
    """Raises ValueError, which does not show the URL."""
    try:
        parse_place(url)
    except ValueError:
        raise ValueError(
            "not a URL of redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://; "
            "a password is percent-encoded"
        ) from None


def read_words(setting: str, path: Path) -> list[tuple[int, list[str]]]:
    """The words of a file, as `words_of` gives them.

    Raises:
        SettingsProblem: the file cannot be read; the message begins with the setting that names it.
    """
    try:
        return words_of(path.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsProblem(f"{setting}: {error}") from error


def words_of(content: bytes) -> list[tuple[int, list[str]]]:
    """The words of each line of a file and its number; blank lines and those that begin with # are skipped.

    Raises:
        UnicodeDecodeError: it is no text.
    """
    lines = content.decode().splitlines()
    return [(i, line.split()) for i, line in enumerate(lines, start=1) if line.strip() and not line.startswith("#")]


class ProcessSettings(BaseSettings):
    """Settings of every process that serves; a subclass names its environment prefix."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", cli_kebab_case=True, cli_implicit_flags=True, cli_hide_none_type=True
    )

    host: str = Field("127.0.0.1", description="Address to listen on")
    port: Port = Field(0, description="Port for calls; 0 picks a free one")
    metrics_port: Port = Field(0, description="Port for Prometheus; 0 serves no metrics")
    tls_cert_file: Path | None = Field(None, description="Certificate of the service, PEM; unset: no TLS")
    tls_key_file: Path | None = Field(None, description="The certificate's key, PEM")
    tls_client_ca_file: Path | None = Field(None, description="Authorities; callers then need a certificate of one")
    tls_reload_ms: int = Field(10_000, ge=10, le=3_600_000, description="How often these files are looked at again")
    tokens_file: Path | None = Field(None, description="File with lines 'tenant token'; unset: no authentication")
    tokens_reload_ms: int = Field(10_000, ge=10, le=3_600_000, description="How often that file is looked at again")
    log_format: Literal["json", "text"] = Field("json", description="How log lines are written")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level logged")
    drain_delay_ms: int = Field(0, ge=0, le=120_000, description="Wait after SIGTERM before refusing calls")
    grace_ms: int = Field(30_000, ge=0, le=600_000, description="Longest wait for running calls at shutdown")

    @model_validator(mode="after")
    def _tls_needs_a_pair(self) -> Self:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_cert_file and tls_key_file need each other")
        if self.tls_client_ca_file is not None and self.tls_cert_file is None:
            raise ValueError("tls_client_ca_file needs tls_cert_file: without TLS nobody shows a certificate")
        return self

    @property
    def service_name(self) -> str:
        """In traces, where the environment gives none: `splitsam-encoder`, `splitsam-decoder`."""
        prefix: str = self.model_config["env_prefix"]
        return prefix.rstrip("_").replace("_", "-").lower()

    @classmethod
    def load(cls, arguments: Sequence[str] = ()) -> Self:
        """Read environment and command line.

        Raises:
            SettingsProblem: one line that names the setting and what it takes.
            SystemExit: --help was asked for, or a flag is unknown (argparse has printed it).
        """
        prefix = cls.model_config.get("env_prefix", "")
        known = {(prefix + name).upper() for name in cls.model_fields}
        unknown = sorted(name for name in os.environ if name.upper().startswith(prefix) and name.upper() not in known)
        if unknown:
            raise SettingsProblem(f"unknown setting in the environment: {', '.join(unknown)}")
        try:
            return cls(_cli_parse_args=list(arguments))  # type: ignore[call-arg]
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"])) or "settings"
            # What was given for the URL, or for all settings together, may hold a password.
            given = "" if name in ("redis_url", "settings") else f" (got {first['input']!r})"
            raise SettingsProblem(f"{name}: {first['msg']}{given}") from None
        except SettingsError as error:
            raise SettingsProblem(str(error)) from error

    def for_log(self) -> dict[str, Any]:
        """All settings in JSON's types."""
        return self.model_dump(mode="json")


class ServiceSettings(ProcessSettings):
    """Settings that both services have."""

    port: Port = Field(0, description="gRPC port; 0 picks a free one")
    health_port: Port = Field(0, description="Port for health checks alone, in plaintext; 0 serves none")
    redis_url: str = Field(
        "redis://127.0.0.1:6379/0", description="redis://, rediss://, unix://, redis+sentinel://, redis+cluster://"
    )
    redis_url_file: Path | None = Field(None, description="File with that URL, which goes before it")
    redis_timeout_ms: int = Field(1000, ge=10, le=60_000, description="Longest Redis round trip, in milliseconds")
    redis_connections: int = Field(8, ge=1, le=256, description="Connections and threads for Redis")
    model: Literal["vit_t", "vit_b", "vit_l", "vit_h"] | None = Field(
        None, description="Architecture; read from the checkpoint when unset"
    )
    checkpoint: str | None = Field(None, description="Weights: a path, file:// or https:// URL; unset: shipped vit_t")
    sha256: str | None = Field(None, description="Digest that the checkpoint file must have")
    cache_dir: Path = Field(DEFAULT_CACHE_DIR, description="Folder for downloaded weights and calibration reports")
    device: str = Field("auto", pattern=_DEVICE, description="auto, cpu, cuda or cuda:N")
    secret_file: Path | None = Field(None, description="File with the secret behind embedding keys")
    previous_secret_file: Path | None = Field(
        None, description="File with another, the next or the last: records are found by it"
    )
    tenant_requests_per_s: float = Field(0, ge=0, le=10**6, description="Requests of one tenant a second; 0: no limit")
    tenant_requests_in_flight: int = Field(0, ge=0, description="Requests of one tenant at once; 0: no limit")
    quotas_file: Path | None = Field(
        None, description="File with lines 'tenant requests_per_s requests_in_flight', instead of those two"
    )
    max_requests_in_flight: int = Field(4096, ge=1, description="Calls and streams in progress, of all tenants")
    reflection: bool = Field(False, description="Serve gRPC reflection")
    max_concurrent_streams: int = Field(1000, ge=1, le=100_000, description="Calls at once on one connection")
    max_connection_age_ms: int = Field(0, ge=0, le=10**9, description="When a connection takes no new calls; 0: never")
    keepalive_ms: int = Field(60_000, ge=100, le=10**8, description="Silence after which a caller is pinged")
    min_ping_interval_ms: int = Field(10_000, ge=0, le=10**7, description="Callers that ping more often are cut off")
    handshake_timeout_ms: int = Field(20_000, ge=100, le=600_000, description="Longest wait for a handshake")
    max_queue: int = Field(256, ge=1, le=100_000, description="Entries that may wait for a batch")
    max_queue_ms: int = Field(30_000, ge=10, le=600_000, description="Longest wait of a click or an image for a batch")
    max_bulk_queue_ms: int = Field(60_000, ge=10, le=600_000, description="The same for bulk work")
    max_image_bytes: int = Field(32 * 2**20, ge=1, le=2**30, description="Bytes of one image file")
    max_image_pixels: int = Field(64_000_000, ge=1, le=10**9, description="Width times height of one image")
    max_upload_bytes: int = Field(
        256 * 2**20, ge=1, le=2**40, description="Bytes of large requests being read or in work; thrice that in memory"
    )
    upload_wait_ms: int = Field(1000, ge=0, le=600_000, description="Longest wait for room among them")
    upload_timeout_ms: int = Field(60_000, ge=10, le=3_600_000, description="Longest wait for the bytes of a request")
    max_images_per_request: int = Field(32, ge=1, le=1024, description="Images in one PredictMasks")
    max_prompts_per_request: int = Field(1024, ge=1, le=65_536, description="Prompts in one PredictMasks")
    max_points_per_prompt: int = Field(64, ge=1, le=1024, description="Points of one prompt")
    max_crop_layers: int = Field(2, ge=0, le=4, description="Layers of crops in one GenerateMasks, 2^n by 2^n each")
    max_points_per_search: int = Field(
        16_384, ge=1, le=2**24, description="Points in one GenerateMasks, on the image and all its crops"
    )
    max_reply_bytes: int = Field(4 * 2**20, ge=2**16, le=2**30, description="Bytes of one unary reply")

    @field_validator("redis_url")
    @classmethod
    def _redis_reads_the_url(cls, url: str) -> str:
        _check_redis_url(url)
        return url

    @model_validator(mode="after")
    def _tenants_need_a_secret(self) -> Self:
        if self.tokens_file is not None and self.secret_file is None:
            raise ValueError("tokens_file needs secret_file: with tenants, keys must not be guessable")
        if self.previous_secret_file is not None and self.secret_file is None:
            raise ValueError("previous_secret_file needs secret_file: it would become the current secret")
        return self

    @model_validator(mode="after")
    def _one_request_has_room(self) -> Self:
        if self.max_upload_bytes < self.max_message_bytes:
            raise ValueError("max_upload_bytes is less than one request: max_image_bytes and 64 KiB around it")
        return self

    @property
    def max_message_bytes(self) -> int:
        """Of one request."""
        return self.max_image_bytes + _MESSAGE_OVERHEAD_BYTES

    @property
    def lane_queue_ms(self) -> Mapping[Lane, float]:
        """The longest wait for a batch in each lane."""
        return {Lane.CLICK: self.max_queue_ms, Lane.BULK: self.max_bulk_queue_ms}

    def key_ring(self) -> KeyRing:
        """The secrets behind keys.

        Raises:
            SettingsProblem: a secret file is missing or too short.
        """
        files = [path for path in (self.secret_file, self.previous_secret_file) if path is not None]
        try:
            return KeyRing([path.read_bytes().strip() for path in files] or [_SINGLE_TENANT_SECRET])
        except (OSError, ValueError) as error:
            raise SettingsProblem(f"secret_file: {error}") from error

    def redis_address(self) -> str:
        """The URL of Redis, password and all.

        Raises:
            SettingsProblem: its file is missing or holds no such URL.
        """
        if self.redis_url_file is None:
            return self.redis_url
        try:
            url = self.redis_url_file.read_text(encoding="utf-8").strip()
            _check_redis_url(url)
        except UnicodeDecodeError:  # its text would show what was read
            raise SettingsProblem("redis_url_file: not a text file") from None
        except (OSError, ValueError) as error:
            raise SettingsProblem(f"redis_url_file: {error}") from None
        return url

    def for_log(self) -> dict[str, Any]:
        """All settings in JSON's types, a password in the Redis URL left out."""
        values = super().for_log()
        head, at, tail = self.redis_url.rpartition("@")
        place = tail.partition("?")[0]  # a query may hold a password too
        values["redis_url"] = f"{head.partition('://')[0]}://***@{place}" if at else place
        return values
