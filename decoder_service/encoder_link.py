"""Calls of the encoder service in the name of our own callers: with their credentials, request id and deadline."""

import contextlib
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc

from splitsam.client.aio_transport import AioTransport
from splitsam.client.connection import TLS, Connection
from splitsam.client.errors import SplitsamError
from splitsam.client.operations import Operations
from splitsam.client.results import EncodedImage
from splitsam.common.calls import Call
from splitsam.common.errors import EncoderFailed, EncoderUnavailable, InvalidArgument, NotServed, ServiceError
from splitsam.common.keys import Crop
from splitsam.decoder_service.settings import DecoderSettings
from splitsam.v1 import encoder_pb2

log = logging.getLogger("splitsam.encoder_link")
_RETRY_S = 1.0
# Answers that mean the same to our caller as to us.
_PASSED_ON = (
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
)


@dataclass(frozen=True)
class EncoderCalls:
    """Calls of the encoder service on one connection, for one caller."""

    transport: AioTransport
    operations: Operations

    async def encode(self, image: bytes, sha256: bytes, crop: Crop | None, deadline_s: float | None) -> EncodedImage:
        """Find the embedding of an image, or of a crop of it, or have it made; cancelling it cancels the call.

        Args:
            deadline_s: when the caller gives up, in seconds of time.monotonic(); None if it never does.

        Raises:
            InvalidArgument: it is no image, or too large.
            EncoderUnavailable: the service cannot be reached, starts or drains.
            EncoderFailed: it refused, with its own code and reason, or failed.
        """
        corners = None if crop is None else encoder_pb2.Crop(x0=crop[0], y0=crop[1], x1=crop[2], y1=crop[3])
        timeout_s = self.operations.encode_timeout_s
        if deadline_s is not None:
            timeout_s = min(timeout_s, deadline_s - time.monotonic())
        try:
            encoded = await self.transport.run(self.operations.encode_crop(image, sha256, corners, timeout_s))
        except SplitsamError as error:
            raise _as_ours(error) from error
        if crop is not None and (encoded.width_px, encoded.height_px) != (crop[2] - crop[0], crop[3] - crop[1]):
            raise EncoderFailed("the encoder service does not know crops: it is older")
        return encoded


class EncoderLink:
    """Where the encoder service is.

    Each search has a connection of its own: it is cheap beside an encode, ends with the search, and shows the
    certificates that lie in the files by then.
    """

    def __init__(self, settings: DecoderSettings):
        self._address = settings.encoder_address
        self._timeout_s = settings.encode_timeout_ms / 1000
        files = (settings.encoder_ca_file, settings.encoder_cert_file, settings.encoder_key_file)
        tls = TLS(*files, settings.encoder_server_name)
        self._tls = tls if settings.encoder_tls or tls != TLS() else None

    @contextlib.asynccontextmanager
    async def open(self, call: Call) -> AsyncIterator[EncoderCalls]:
        """A connection for the calls that one call of ours needs.

        Raises:
            NotServed: the deployment names no encoder service.
        """
        if self._address is None:
            raise NotServed("image: this decoder service was given no encoder_address; send an embedding_key")
        metadata = (("x-request-id", call.request_id), ("authorization", call.authorization))
        named = tuple((name, value) for name, value in metadata if value)
        transport = AioTransport(Connection((self._address,), (), named, self._tls))
        try:
            yield EncoderCalls(transport, Operations(transport.where, self._timeout_s, self._timeout_s))
        finally:
            await transport.close()


def _as_ours(error: SplitsamError) -> ServiceError:
    """What our caller is told; addresses and details of the connection go to the log alone."""
    if error.code is grpc.StatusCode.INVALID_ARGUMENT and error.violations:
        return InvalidArgument(error.violations[0].field, error.violations[0].description)
    log.warning("the encoder service gave no embedding", extra={"problem": error.message, "reason": error.reason})
    if error.code is grpc.StatusCode.UNAVAILABLE:
        return EncoderUnavailable("the encoder service does not answer", retry_delay_s=error.retry_delay_s or _RETRY_S)
    if error.code in _PASSED_ON:
        said = error.message if error.reason != error.code.name or error.metadata else error.code.value[1]
        return EncoderFailed(
            f"the encoder service: {said}", error.code, error.reason, retry_delay_s=error.retry_delay_s
        )
    message = "the encoder service failed; its log has the details under this request's id"
    return EncoderFailed(message)
