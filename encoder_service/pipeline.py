"""From image bytes to a stored embedding, once per image: look up, claim, prepare, encode in a batch, store."""

import asyncio
import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from splitsam.common import tracing
from splitsam.common.batcher import Batcher, Lane
from splitsam.common.cache import RecordCache
from splitsam.common.codecs import CODECS
from splitsam.common.errors import CacheUnavailable, EmbeddingExpired, InvalidArgument, QueueFull
from splitsam.common.keys import Address, Crop, EncodingVersion, KeyRing
from splitsam.common.metrics import Metrics
from splitsam.common.records import EMBEDDING, SHAPES, RecordHeader, Size
from splitsam.common.single_flight import SingleFlight
from splitsam.encoder_service.decode_workers import DecodeWorkers
from splitsam.encoder_service.in_work import Upload, Work, count_in_lanes, count_on_their_way, hash_and_weigh
from splitsam.encoder_service.model import DeviceImage, EncoderImage
from splitsam.encoder_service.preprocess import PreparedImage, prepare_image
from splitsam.encoder_service.settings import EncoderSettings

_CLAIM_POLL_S = 0.05
# They let go of the interpreter, and all bytes that may be in work (`max_upload_bytes`) are hashed in a fraction of a
# second: nothing waits here for long, in whatever order.
_HASHING_THREADS = 2


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
        decode_on_device: tried first with what is not cropped; None for an image that is prepared on the host.
    """

    def __init__(
        self,
        batcher: Batcher[EncoderImage, torch.Tensor],
        cache: RecordCache,
        keys: KeyRing,
        version: EncodingVersion,
        settings: EncoderSettings,
        metrics: Metrics,
        pin: Callable[[PreparedImage], PreparedImage] = lambda image: image,
        decode_on_device: Callable[[bytes], DeviceImage | None] = lambda _: None,
    ):
        self._batcher = batcher
        self._pin = pin
        self._decode_on_device = decode_on_device
        self._cache = cache
        self._keys = keys
        self._version = version
        self._settings = settings
        self._metrics = metrics
        self._limits = settings.image_limits()
        self._flights: SingleFlight[Address, Encoded] = SingleFlight()
        self._works: dict[Address, Work] = {}
        self._workers: DecodeWorkers | None = None
        self._hashing = ThreadPoolExecutor(_HASHING_THREADS, thread_name_prefix="splitsam-hash")
        self._prepare: Batcher[Upload, EncoderImage] = Batcher(
            self._decode,
            name="prepare",
            called="decode image",
            max_weight=1,
            max_wait_ms=0,
            max_queue=settings.max_queue,
            max_queue_ms=settings.lane_queue_ms,
            weigh=lambda upload: upload.weight,
            threads=settings.decode_processes or settings.decode_threads,
            metrics=metrics,
        )

    def start(self) -> None:
        if self._settings.decode_processes:
            self._workers = DecodeWorkers(self._settings.decode_processes, self._limits)
        self._prepare.start()

    async def close(self) -> None:
        """Decode what is queued, then stop; the batcher should be open until then."""
        await self._prepare.close()
        if self._workers is not None:
            await asyncio.to_thread(self._workers.close)
        self._hashing.shutdown(wait=False, cancel_futures=True)

    async def encode(
        self, tenant: str, image: bytes, lane: Lane, deadline_s: float | None = None, crop: Crop | None = None
    ) -> Encoded:
        """Encode an image or a crop of it, or find the embedding.

        Of several callers of one image the first lane counts, for all of them.

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
        loop = asyncio.get_running_loop()
        digest, weight = await loop.run_in_executor(self._hashing, hash_and_weigh, image, self._limits.max_pixels)
        addresses = self._keys.embedding_addresses(tenant, digest, self._version, crop)
        address = addresses[0]
        if address in self._flights:
            tracing.note({"splitsam.joined": True})  # the work is in the trace of whoever asked first
            self._promote(self._works[address], lane)
        else:
            self.check_room(tenant, lane, until_s, weight)  # others may have come first while this one was hashed
            self._works[address] = Work(tenant, lane, Upload(image, crop, weight))
        work = self._works[address]
        try:
            return await self._flights.run(address, lambda: self._encode_once(work, addresses))
        finally:
            if address not in self._flights:
                self._works.pop(address, None)

    def check_room(self, tenant: str, lane: Lane, deadline_s: float = math.inf, weight: int = 1) -> None:
        """Refuse now an image that could not be prepared or encoded in time.

        Args:
            weight: as of `Upload`.

        Raises:
            QueueFull: too many images are in work, or would take too long.
            DeadlineTooShort: it would be encoded too late for its caller.
            NotReady: the service is shutting down.
        """
        if count_in_lanes(self._works.values(), lane) >= self._settings.max_queue:
            raise QueueFull(f"{self._settings.max_queue} images are in work already", retry_delay_s=1.0)
        self._prepare.check_room(lane=lane, tenant=tenant, deadline_s=deadline_s, weight=weight)
        ahead = count_on_their_way(self._works.values(), tenant, lane)
        self._batcher.check_room(lane=lane, tenant=tenant, deadline_s=deadline_s, ahead=ahead)

    async def look_up(self, tenant: str, image_sha256: bytes, crop: Crop | None = None) -> RecordHeader | None:
        """The header of the embedding of an image, or of a crop of it, if the cache holds it.

        Raises:
            InvalidArgument: the digest is not 32 bytes.
            CacheUnavailable: the cache does not answer.
        """
        if len(image_sha256) != hashlib.sha256().digest_size:
            raise InvalidArgument("image_sha256", f"has {len(image_sha256)} bytes; a SHA-256 digest has 32")
        addresses = self._keys.embedding_addresses(tenant, image_sha256, self._version, crop)
        return await self._cache.peek(EMBEDDING, addresses, ttl_s=self._settings.embedding_ttl_s)

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

    def _promote(self, work: Work, lane: Lane) -> None:
        """Let an image in work wait in a lane no later than this one."""
        if lane >= work.lane:
            return
        work.lane = lane
        work.promoted_at_s = time.monotonic()
        self._prepare.promote(work.upload, lane)
        if work.prepared is not None:
            self._batcher.promote(work.prepared, lane)

    async def _encode_once(self, work: Work, addresses: list[Address]) -> Encoded:
        start_s = time.perf_counter()
        claimed = False
        try:
            header, claimed = await self._find_or_claim(addresses)
        except CacheUnavailable:
            header = None  # encode anyway; storing will be tried, and the reply says what became of it
        cache_ms = (time.perf_counter() - start_s) * 1000
        stored = False
        try:
            if header is not None:
                return Encoded(header, cache_hit=True, stored=True, timings=EncodeTimings(cache_ms=cache_ms))
            encoded = await self._compute(work, addresses[0], claimed, cache_ms)
            stored = encoded.stored
            return encoded
        finally:
            if claimed and not stored:  # else it went with the embedding
                with contextlib.suppress(CacheUnavailable):  # the claim lapses by itself
                    await self._cache.release(addresses[0])

    async def _compute(self, work: Work, address: Address, claimed: bool, cache_ms: float) -> Encoded:
        deadline_s = time.monotonic() + self._settings.encode_timeout_ms / 1000
        with tracing.step("prepare image", {"splitsam.image.bytes": len(work.upload.image)}) as span:
            decoded = await self._prepare.submit(work.upload, deadline_s=deadline_s, lane=work.lane, tenant=work.tenant)
            work.prepared = prepared = decoded.value
            width, height = prepared.image_size
            span.set_attributes({"splitsam.image.width": width, "splitsam.image.height": height})
        decode_s = decoded.model_ms / 1000
        self._metrics.decode_seconds.observe(decode_s)
        in_lane_s = max(0.0, time.monotonic() - decode_s - work.promoted_at_s)
        served = await self._batcher.submit(
            prepared,
            deadline_s=deadline_s,
            lane=work.lane,
            tenant=work.tenant,
            waited_s=min(decoded.queue_ms / 1000, in_lane_s),
        )
        header = RecordHeader(
            kind=EMBEDDING,
            address=address,
            model_id=self._version.model_id,
            codec=CODECS[self._version.codec],
            shape=SHAPES[EMBEDDING],
            image_size=Size(*prepared.image_size),
            input_size=Size(*prepared.input_size),
            orientation=prepared.orientation,
        )
        start_s = time.perf_counter()
        stored = await self._store(header, served.value, claimed)
        store_ms = (time.perf_counter() - start_s) * 1000
        queue_ms = decoded.queue_ms + served.queue_ms
        timings = EncodeTimings(cache_ms, decoded.model_ms, queue_ms, served.model_ms, store_ms)
        return Encoded(header, cache_hit=False, stored=stored, timings=timings)

    def _decode(self, uploads: Sequence[Upload]) -> list[EncoderImage]:
        return [self._decode_one(upload) for upload in uploads]

    def _decode_one(self, upload: Upload) -> EncoderImage:
        on_device = self._decode_on_device(upload.image) if upload.crop is None else None
        if on_device is not None:
            return on_device
        if self._workers is not None:
            return self._pin(self._workers.prepare(upload.image, upload.crop))
        return self._pin(prepare_image(upload.image, self._limits, upload.crop))

    async def _store(self, header: RecordHeader, embedding: torch.Tensor, claimed: bool) -> bool:
        releases = header.address if claimed else None
        try:
            await self._cache.put((header, embedding), ttl_s=self._settings.embedding_ttl_s, releases=releases)
        except CacheUnavailable:
            return False
        return True

    async def _find_or_claim(self, addresses: list[Address]) -> tuple[RecordHeader | None, bool]:
        """The embedding's header, or the right to encode it; neither when another replica takes too long over it."""
        ttl_s, claim_ms = self._settings.embedding_ttl_s, self._settings.encode_timeout_ms
        until_s = time.monotonic() + self._settings.claim_wait_ms / 1000
        while True:
            header, claimed = await self._cache.peek_or_claim(EMBEDDING, addresses, ttl_s=ttl_s, claim_ms=claim_ms)
            if header is not None or claimed or time.monotonic() >= until_s:
                return header, claimed
            await asyncio.sleep(_CLAIM_POLL_S)
