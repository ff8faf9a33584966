"""The asyncio client: the same as `Client`, awaited, and a pointer stream."""

from collections.abc import AsyncIterator, Iterable, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

from splitsam.client.aio_transport import AioTransport
from splitsam.client.connection import DEFAULT_DECODER, DEFAULT_ENCODER, TLS, connection
from splitsam.client.names import Address
from splitsam.client.operations import EVERYTHING_TIMEOUT_S, Operations
from splitsam.client.pointer import Pointer
from splitsam.client.prompts import GridOptions, Image, MaskInput, OutputOptions, Prompt, Prompts
from splitsam.client.results import (
    BulkResult,
    DeploymentInfo,
    Embedding,
    EncodedImage,
    FoundMask,
    ImageMasks,
    ImageSource,
    Mask,
)


class AsyncClient:
    """Segment Anything on a splitsam deployment, for one event loop; arguments and errors as of `Client`."""

    def __init__(
        self,
        encoder: str | Sequence[str] = DEFAULT_ENCODER,
        decoder: str | Sequence[str] = DEFAULT_DECODER,
        *,
        token: str | None = None,
        tls: TLS | bool | None = None,
        encode_timeout_s: float = 30.0,
        predict_timeout_s: float = 10.0,
        prefetch: bool = True,
    ) -> None:
        where = connection(encoder, decoder, token, tls)
        self._operations = Operations(where, encode_timeout_s, predict_timeout_s, prefetch)
        self._transport = AioTransport(where)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._transport.close()

    async def encode(
        self, image: ImageSource, *, timeout_s: float | None = None, background: bool = False
    ) -> EncodedImage:
        """As `Client.encode`."""
        return await self._transport.run(self._operations.encode(image, timeout_s, background))

    async def find(self, sha256: bytes, *, timeout_s: float | None = None) -> EncodedImage | None:
        """As `Client.find`."""
        return await self._transport.run(self._operations.find(sha256, timeout_s))

    async def predict(
        self,
        image: Image,
        *,
        points: Any = (),
        labels: Any = None,
        box: Any = None,
        mask_input: MaskInput | None = None,
        timeout_s: float | None = None,
        **output: Unpack[OutputOptions],
    ) -> Sequence[Mask]:
        """As `Client.predict`."""
        prompt = Prompt(points, labels, box, mask_input)
        images = await self._transport.run(self._operations.predict([(image, [prompt])], output, timeout_s))
        return images[0].prompts[0]

    async def predict_batch(
        self,
        images: Sequence[Prompts],
        *,
        timeout_s: float | None = None,
        background: bool = False,
        **output: Unpack[OutputOptions],
    ) -> list[ImageMasks]:
        """As `Client.predict_batch`."""
        return await self._transport.run(self._operations.predict(images, output, timeout_s, background=background))

    def generate(
        self,
        image: Image,
        *,
        output: OutputOptions | None = None,
        timeout_s: float = EVERYTHING_TIMEOUT_S,
        **grid: Unpack[GridOptions],
    ) -> AsyncIterator[FoundMask]:
        """As `Client.generate`."""
        return self._transport.results(self._operations.generate(image, grid, output or {}, timeout_s))

    def encode_many(
        self, images: Iterable[ImageSource], *, in_flight: int = 8, stream_timeout_s: float = 3600.0
    ) -> AsyncIterator[BulkResult]:
        """As `Client.encode_many`."""
        return self._transport.results(self._operations.encode_many(images, in_flight, stream_timeout_s))

    async def download_embedding(self, image: Image, *, timeout_s: float | None = None) -> Embedding:
        """As `Client.download_embedding`."""
        return await self._transport.run(self._operations.download(image, timeout_s))

    async def info(self, *, timeout_s: float | None = None, decoder: Address | None = None) -> DeploymentInfo:
        """As `Client.info`; or of an encoder and one of `decoders`."""
        return await self._transport.run(self._operations.info(timeout_s, decoder))

    async def decoders(self, *, timeout_s: float | None = None) -> tuple[Address, ...]:
        """Where the decoders are at the moment, each of those behind a name."""
        time_s = self._operations.predict_timeout_s if timeout_s is None else timeout_s
        return await self._transport.resolved(self._transport.where.decoders, time_s)

    def pointer(self, image: Image, *, session_timeout_s: float = 3600.0, **output: Unpack[OutputOptions]) -> Pointer:
        """One user's pointer over an image; use it with `async with`.

        Args:
            image: what `encode` returned, or an embedding key.
            session_timeout_s: deadline of the whole stream.
            output: see `OutputOptions`.
        """
        return Pointer(self._transport, image, output, session_timeout_s)
