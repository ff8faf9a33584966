"""Where everything mode takes the embeddings of an image and its crops from: a key, or the image itself."""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from typing import Protocol

from splitsam.common.calls import Call
from splitsam.common.errors import CacheUnavailable, EmbeddingExpired, QueueFull
from splitsam.common.keys import Crop
from splitsam.decoder_service.embeddings import Embedding, EmbeddingStore
from splitsam.decoder_service.encoder_link import EncoderCalls, EncoderLink


class Source(Protocol):
    """An image to search."""

    async def embedding(self, crop: Crop | None) -> Embedding:
        """Of a crop, or of the whole.

        Raises:
            EmbeddingExpired, ModelMismatch, CacheUnavailable, DeviceOutOfMemory: as `EmbeddingStore.get` raises them.
            InvalidArgument, EncoderUnavailable, EncoderFailed: as `EncoderCalls.encode` raises them.
        """


class KeySource:
    """An image that is encoded already; it has no crops. What was found once stays, whatever leaves the cache."""

    def __init__(self, embeddings: EmbeddingStore, tenant: str, key: str):
        self._embeddings = embeddings
        self._tenant = tenant
        self._key = key
        self._found: Embedding | None = None

    async def embedding(self, crop: Crop | None) -> Embedding:
        if crop is not None:
            raise ValueError("a key names no crop")
        if self._found is None:
            self._found = await self._embeddings.get(self._tenant, bytes.fromhex(self._key))
        return self._found


class ImageSource:
    """An image file, which the encoder service encodes, and crop by crop.

    Args:
        deadline_s: when the caller gives up, in seconds of time.monotonic(); None if it never does.
    """

    def __init__(
        self,
        encoder: EncoderCalls,
        embeddings: EmbeddingStore,
        tenant: str,
        image: bytes,
        deadline_s: float | None,
    ):
        self._encoder = encoder
        self._embeddings = embeddings
        self._tenant = tenant
        self._image = image
        self._deadline_s = deadline_s
        self._sha256: bytes | None = None
        self._keys: dict[Crop | None, bytes] = {}

    async def embedding(self, crop: Crop | None) -> Embedding:
        if crop in self._keys:
            try:
                return await self._embeddings.get(self._tenant, self._keys[crop])
            except EmbeddingExpired:
                pass  # evicted since; the image is at hand
        self._keys[crop] = await self._encode(crop)
        return await self._embeddings.get(self._tenant, self._keys[crop])

    async def _encode(self, crop: Crop | None) -> bytes:
        if self._sha256 is None:
            self._sha256 = (await asyncio.to_thread(hashlib.sha256, self._image)).digest()
        encoded = await self._encoder.encode(self._image, self._sha256, crop, self._deadline_s)
        if not encoded.stored:
            raise CacheUnavailable("the encoder service could not store the embedding", retry_delay_s=1.0)
        return bytes.fromhex(encoded.key)


class Sources:
    """Opens what a search asks for.

    Args:
        max_image_bytes: images that searches hold for as long as they run; one is always let in. What callers may send
            at all has to leave room for clicks.
    """

    def __init__(self, embeddings: EmbeddingStore, link: EncoderLink, *, max_image_bytes: int):
        self._embeddings = embeddings
        self._link = link
        self._max_bytes = max_image_bytes
        self._held_bytes = 0

    @contextlib.asynccontextmanager
    async def open(self, call: Call, origin: str | bytes) -> AsyncIterator[Source]:
        """The image behind a key, or in a file, for one call.

        Raises:
            NotServed: this deployment takes no images.
            QueueFull: other searches hold too many bytes of images.
        """
        if isinstance(origin, str):
            yield KeySource(self._embeddings, call.tenant, origin)
            return
        if self._held_bytes and self._held_bytes + len(origin) > self._max_bytes:
            raise QueueFull(f"searches hold {self._held_bytes} bytes of images already", retry_delay_s=5.0)
        self._held_bytes += len(origin)
        try:
            async with self._link.open(call) as encoder:
                yield ImageSource(encoder, self._embeddings, call.tenant, origin, call.deadline_s)
        finally:
            self._held_bytes -= len(origin)
