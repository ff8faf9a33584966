"""Embeddings on their way from the cache to the model: kept decoded on the device under a budget of bytes."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import torch

from splitsam.common import tracing
from splitsam.common.cache import RecordCache
from splitsam.common.device_guard import DeviceGuard
from splitsam.common.errors import DeviceOutOfMemory, EmbeddingExpired, ModelMismatch
from splitsam.common.keys import Address, KeyRing
from splitsam.common.lru import ByteBudgetLRU
from splitsam.common.metrics import Metrics
from splitsam.common.records import EMBEDDING, RecordHeader
from splitsam.common.single_flight import SingleFlight
from splitsam.decoder_service.prepared import PreparedEmbedding


@dataclass(frozen=True, eq=False)
class Embedding:
    """An embedding ready for the model.

    Args:
        header: its sizes, orientation and address.
        prepared: on the model's device.
    """

    header: RecordHeader
    prepared: PreparedEmbedding


class EmbeddingStore:
    """Fetches embeddings once and keeps those just used.

    Args:
        model_id: of the decoder; embeddings of another model are refused.
        prepare: from [256, 64, 64] fp16 or bf16 to what the decoder keeps on its device; blocking.
        budget_bytes: what the prepared embeddings may take on the device.
        ttl_s: life of an embedding in Redis, renewed by each fetch.
    """

    def __init__(
        self,
        cache: RecordCache,
        keys: KeyRing,
        *,
        model_id: str,
        prepare: Callable[[torch.Tensor], PreparedEmbedding],
        guard: DeviceGuard,
        budget_bytes: int,
        ttl_s: int,
        metrics: Metrics,
    ):
        self._cache = cache
        self._keys = keys
        self._model_id = model_id
        self._prepare = prepare
        self._guard = guard
        self._ttl_s = ttl_s
        self._metrics = metrics
        self._resident: ByteBudgetLRU[Address, Embedding] = ByteBudgetLRU(budget_bytes)
        self._flights: SingleFlight[Address, Embedding] = SingleFlight()

    async def get(self, tenant: str, key: bytes) -> Embedding:
        """The tenant's embedding of this key.

        Raises:
            EmbeddingExpired: neither memory nor the cache holds it for this tenant.
            ModelMismatch: another model made it.
            CacheUnavailable: it is not in memory and the cache does not answer.
            DeviceOutOfMemory: there is no room for it, even without the others.
        """
        addresses = self._keys.addresses(tenant, key)
        resident = self._resident.get(addresses[0])
        result = "miss" if resident is None else "hit"
        self._metrics.cache_lookups.labels("embedding", "memory", result).inc()
        with tracing.step("find embedding", {"splitsam.in_memory": resident is not None}):
            if resident is not None:
                return resident
            return await self._flights.run(addresses[0], lambda: self._fetch(addresses))

    async def prefetch(self, tenant: str, key: bytes) -> bool:
        """Bring an embedding into memory ahead of `get`, whose hits and misses it is not counted among.

        Returns:
            Whether it was there already.

        Raises:
            What `get` raises.
        """
        addresses = self._keys.addresses(tenant, key)
        if addresses[0] in self._resident:
            self._metrics.prefetches.labels("resident").inc()
            return True
        try:
            with tracing.step("find embedding", {"splitsam.in_memory": False}):
                await self._flights.run(addresses[0], lambda: self._fetch(addresses))
        except BaseException:
            self._metrics.prefetches.labels("failed").inc()
            raise
        self._metrics.prefetches.labels("fetched").inc()
        return False

    async def _fetch(self, addresses: list[Address]) -> Embedding:
        record = await self._cache.get(EMBEDDING, addresses, ttl_s=self._ttl_s)
        if record is None:
            raise EmbeddingExpired("the embedding is not in the cache; encode the image again")
        header, values = record
        if header.model_id != self._model_id:
            message = f"the embedding was made by model {header.model_id[:12]}, this decoder runs {self._model_id[:12]}"
            raise ModelMismatch(message, metadata={"embedding_model": header.model_id, "decoder_model": self._model_id})
        with tracing.step("prepare embedding"):
            try:
                prepared = await asyncio.to_thread(self._prepare_guarded, values)
            except DeviceOutOfMemory:
                self._resident.clear()
                prepared = await asyncio.to_thread(self._prepare_guarded, values)
        embedding = Embedding(header, prepared)
        evicted = self._resident.put(addresses[0], embedding, prepared.size_bytes)
        self._metrics.evictions.labels("embedding").inc(evicted)
        self._metrics.memory_bytes.labels("embedding").set(self._resident.used_bytes)
        return embedding

    def _prepare_guarded(self, values: torch.Tensor) -> PreparedEmbedding:
        with self._guard.watch():
            return self._prepare(values)
