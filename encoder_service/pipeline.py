"""From image bytes to a stored embedding, once per image: look up, claim, prepare, encode in a batch, store."""

import asyncio
import contextlib
import hashlib
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

from splitsam.common import tracing
from splitsam.common.batcher import Batcher, Lane
from splitsam.common.cache import RecordCache
from splitsam.common.errors import CacheUnavailable, EmbeddingExpired, InvalidArgument, QueueFull
from splitsam.common.keys import Address, Crop, EncodingVersion, KeyRing
from splitsam.common.metrics import Metrics
from splitsam.common.records import CODECS, EMBEDDING, SHAPES, RecordHeader, Size
from splitsam.common.single_flight import SingleFlight
from splitsam.encoder_service.preprocess import ImageLimits, PreparedImage, prepare_image
from splitsam.encoder_service.settings import EncoderSettings

_CLAIM_POLL_S = 0.05
Result = TypeVar("Result")


@dataclass(frozen=True)
class EncodeTimings:
    """Milliseconds by stage; 0 for a stage that did not run."""

    cache_ms: float = 0.0
    preprocess_ms: float = 0.0
    queue_ms: float = 0.0
    model_ms: float = 0.0
    store_ms: float = 0.0


@dataclass(frozen=True)
class Encoded:
    """An encoded image.

    Args:
        header: its record's header, with key and sizes.
        cache_hit: nothing was computed.
        stored: the cache holds it.
    """

    header: RecordHeader
    cache_hit: bool
    stored: bool
    timings: EncodeTimings


class EncodePipeline:
    """Encodes each image once, inside this process and between replicas.

    Args:
        pin: what is done with a prepared image on the thread that prepared it, before it waits for its batch.
    """

    def __init__(
        self,
        batcher: Batcher[PreparedImage, torch.Tensor],
        cache: RecordCache,
        keys: KeyRing,
        version: EncodingVersion,
        settings: EncoderSettings,
        metrics: Metrics,
        pin: Callable[[PreparedImage], PreparedImage] = lambda image: image,
    ):
        self._batcher = batcher
        self._pin = pin
        self._cache = cache
        self._keys = keys
        self._version = version
        self._settings = settings
        self._metrics = metrics
        self._limits = ImageLimits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels)
        self._submitted: set[Address] = set()
        self._flights: SingleFlight[Address, Encoded] = SingleFlight()
        self._threads = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="splitsam-image")

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def encode(
        self, tenant: str, image: bytes, lane: Lane, deadline_s: float | None = None, crop: Crop | None = None
    ) -> Encoded:
        """Encode an image or a crop of it, or find the embedding.

        Args:
            image: the bytes of an image file.
            deadline_s: when the caller gives up, in seconds of time.monotonic(); None if it never does.

        Raises:
            InvalidArgument: not an image within the limits, or no crop of it.
            QueueFull, DeadlineTooShort, NotReady: as `check_room` raises them.
        """
        until_s = math.inf if deadline_s is None else deadline_s
        self.check_room(tenant, lane, until_s)
        if not image:
            raise InvalidArgument("image", "is empty; send the bytes of a JPEG, PNG or WebP file")
        digest = await self._on_thread(_digest, image)
        addresses = self._keys.embedding_addresses(tenant, digest, self._version, crop)
        if addresses[0] in self._flights:
            tracing.note({"splitsam.joined": True})  # the work is in the trace of whoever asked first
        else:
            self.check_room(tenant, lane, until_s)  # others may have come first while this one was hashed
        return await self._flights.run(addresses[0], lambda: self._encode_once(tenant, image, crop, addresses, lane))

    def check_room(self, tenant: str, lane: Lane, deadline_s: float = math.inf) -> None:
        """Refuse now an image that could not be encoded in time; those that are being prepared come before it.

        Raises:
            QueueFull: too many images are in work, or would take too long.
            DeadlineTooShort: it would be encoded too late for its caller.
            NotReady: the service is shutting down.
        """
        if len(self._flights) >= self._settings.max_queue:
            raise QueueFull(f"{self._settings.max_queue} images are in work already", retry_delay_s=1.0)
        preparing = len(self._flights) - len(self._submitted)
        self._batcher.check_room(lane=lane, tenant=tenant, deadline_s=deadline_s, ahead=preparing)

    async def look_up(self, tenant: str, image_sha256: bytes, crop: Crop | None = None) -> RecordHeader | None:
        """The header of the embedding of an image, or of a crop of it, if the cache holds it.

        Raises:
            InvalidArgument: the digest is not 32 bytes.
            CacheUnavailable: the cache does not answer.
        """
        if len(image_sha256) != hashlib.sha256().digest_size:
            raise InvalidArgument("image_sha256", f"has {len(image_sha256)} bytes; a SHA-256 digest has 32")
        return await self._peek(self._keys.embedding_addresses(tenant, image_sha256, self._version, crop))

    async def fetch(self, tenant: str, key: bytes) -> tuple[RecordHeader, torch.Tensor]:
        """A stored embedding, [256, 64, 64].

        Raises:
            EmbeddingExpired: the cache does not hold it for this tenant.
            CacheUnavailable: the cache does not answer.
        """
        addresses = self._keys.addresses(tenant, key)
        ttl_s = self._settings.embedding_ttl_s
        record = await self._cache.get(EMBEDDING, addresses, ttl_s=ttl_s)
        if record is None:
            raise EmbeddingExpired("the embedding is not in the cache; encode the image again")
        return record

    async def _encode_once(
        self, tenant: str, image: bytes, crop: Crop | None, addresses: list[Address], lane: Lane
    ) -> Encoded:
        start_s = time.perf_counter()
        claimed = False
        try:
            header, claimed = await self._find_or_claim(addresses)
        except CacheUnavailable:
            header = None  # encode anyway; storing will be tried, and the reply says what became of it
        cache_ms = (time.perf_counter() - start_s) * 1000
        try:
            if header is not None:
                return Encoded(header, cache_hit=True, stored=True, timings=EncodeTimings(cache_ms=cache_ms))
            return await self._compute(tenant, image, crop, addresses[0], lane, cache_ms)
        finally:
            self._submitted.discard(addresses[0])
            if claimed:
                with contextlib.suppress(CacheUnavailable):  # the claim lapses by itself
                    await self._cache.release(addresses[0])

    async def _compute(
        self, tenant: str, image: bytes, crop: Crop | None, address: Address, lane: Lane, cache_ms: float
    ) -> Encoded:
        start_s = time.perf_counter()
        with tracing.step("decode image", {"splitsam.image.bytes": len(image)}) as span:
            prepared = await self._on_thread(self._prepare, image, crop)
            width, height = prepared.image_size
            span.set_attributes({"splitsam.image.width": width, "splitsam.image.height": height})
        preprocess_s = time.perf_counter() - start_s
        self._metrics.decode_seconds.observe(preprocess_s)
        deadline_s = time.monotonic() + self._settings.encode_timeout_ms / 1000
        self._submitted.add(address)
        served = await self._batcher.submit(prepared, deadline_s=deadline_s, lane=lane, tenant=tenant)
        header = RecordHeader(
            kind=EMBEDDING,
            address=address,
            model_id=self._version.model_id,
            dtype=CODECS[self._version.codec],
            shape=SHAPES[EMBEDDING],
            image_size=Size(*prepared.image_size),
            input_size=Size(*prepared.input_size),
            orientation=prepared.orientation,
        )
        start_s = time.perf_counter()
        stored = await self._store(header, served.value)
        store_ms = (time.perf_counter() - start_s) * 1000
        timings = EncodeTimings(cache_ms, preprocess_s * 1000, served.queue_ms, served.model_ms, store_ms)
        return Encoded(header, cache_hit=False, stored=stored, timings=timings)

    def _prepare(self, image: bytes, crop: Crop | None) -> PreparedImage:
        return self._pin(prepare_image(image, self._limits, crop))

    async def _store(self, header: RecordHeader, embedding: torch.Tensor) -> bool:
        try:
            await self._cache.put((header, embedding), ttl_s=self._settings.embedding_ttl_s)
        except CacheUnavailable:
            return False
        return True

    async def _peek(self, addresses: list[Address]) -> RecordHeader | None:
        ttl_s = self._settings.embedding_ttl_s
        return await self._cache.peek(EMBEDDING, addresses, ttl_s=ttl_s)

    async def _find_or_claim(self, addresses: list[Address]) -> tuple[RecordHeader | None, bool]:
        """The embedding's header, or the right to encode it; neither when another replica takes too long over it."""
        until_s = time.monotonic() + self._settings.claim_wait_ms / 1000
        while (header := await self._peek(addresses)) is None:
            if await self._cache.claim(addresses[0], ttl_ms=self._settings.encode_timeout_ms):
                return await self._peek(addresses), True  # the last holder may have stored it since we looked
            if time.monotonic() >= until_s:
                return None, False
            await asyncio.sleep(_CLAIM_POLL_S)
        return header, False

    async def _on_thread(self, work: Callable[..., Result], *arguments: object) -> Result:
        """Arguments, not a closure: that would keep the image alive with the traceback of whatever was raised."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)


def _digest(image: bytes) -> bytes:
    return hashlib.sha256(image).digest()
