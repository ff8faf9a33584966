"""Logits of earlier answers, kept for a while under a token that only their tenant and embedding can use."""

import asyncio
import contextlib
import dataclasses
import logging
import time

import numpy as np
import numpy.typing as npt
import torch

from splitsam.common.cache import RecordCache
from splitsam.common.codecs import FP16, to_fp16
from splitsam.common.errors import CacheUnavailable, RefinementExpired
from splitsam.common.keys import Address, KeyRing
from splitsam.common.lru import ByteBudgetLRU
from splitsam.common.metrics import Metrics
from splitsam.common.records import LOGITS, SHAPES, RecordHeader, parse_key

log = logging.getLogger("splitsam.refinements")

# Logits of 128 KiB that wait for Redis; when there are more, it hangs, and the rest stays in memory alone.
_MOST_WAITING = 256
_WRITTEN_AT_ONCE = 16
_WRITE_S = 10.0  # the cache's own timeout is shorter
_LOGGED_EVERY_S = 10.0


class RefinementStore:
    """Keeps logits in memory for this replica and, no answer waiting for that, in Redis for every one.

    Args:
        budget_bytes: what the logits in memory may take.
        ttl_s: life of a token in Redis.
    """

    def __init__(self, cache: RecordCache, keys: KeyRing, *, budget_bytes: int, ttl_s: int, metrics: Metrics):
        self._cache = cache
        self._keys = keys
        self._ttl_s = ttl_s
        self._metrics = metrics
        self._resident: ByteBudgetLRU[Address, tuple[torch.Tensor, float]] = ByteBudgetLRU(budget_bytes)
        self._waiting: list[tuple[RecordHeader, torch.Tensor]] = []
        self._writer: asyncio.Task[None] | None = None
        self._silent_until_s = 0.0

    async def close(self) -> None:
        """Waits for what is on its way to Redis."""
        if self._writer is not None:
            await self._writer

    def save(self, tenant: str, embedding: RecordHeader, mask_index: int, logits: torch.Tensor) -> str:
        """Keep one mask's logits, which this replica can use at once and the others when Redis has them.

        Args:
            embedding: the header of the embedding the mask belongs to.
            logits: [256, 256] floating on the CPU.

        Returns:
            The token, 64 hex digits.
        """
        address = self._keys.new_refinement_address(tenant, embedding.address.key, mask_index)
        header = dataclasses.replace(embedding, kind=LOGITS, address=address, codec=FP16, shape=SHAPES[LOGITS])
        # A view would keep the whole batch alive.
        kept = logits.clone() if logits.dtype == torch.float16 else to_fp16(logits)
        self._remember(address, kept)
        if len(self._waiting) < _MOST_WAITING:
            self._waiting.append((header, kept[None]))
        else:
            self._leave_out()
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write())
        return address.key.hex()

    def _leave_out(self) -> None:
        """Count logits that Redis is not given, and say so now and then."""
        self._metrics.cache_unstored.labels("logits", "backlog").inc()
        now_s = time.monotonic()
        if now_s >= self._silent_until_s:
            self._silent_until_s = now_s + _LOGGED_EVERY_S
            log.warning("redis is behind with logits, more of them stay here alone", extra={"waiting": _MOST_WAITING})

    async def _write(self) -> None:
        """One round trip after the other, each with what has come meanwhile."""
        while self._waiting:
            records, self._waiting = self._waiting[:_WRITTEN_AT_ONCE], self._waiting[_WRITTEN_AT_ONCE:]
            with contextlib.suppress(CacheUnavailable):  # the cache has said so in the log
                await self._cache.put(*records, ttl_s=self._ttl_s, wait_s=_WRITE_S)

    async def load(self, tenant: str, embedding_key: bytes, token: str) -> npt.NDArray[np.float16]:
        """The logits behind a token.

        Returns:
            [256, 256].

        Raises:
            RefinementExpired: the token is unknown, expired, or of another tenant or embedding.
            CacheUnavailable: it is not in memory and the cache does not answer.
        """
        key = parse_key(token)
        address = None if key is None else self._keys.refinement_address(tenant, embedding_key, key)
        if address is None:
            raise RefinementExpired("the refinement token is not one of this embedding; send the prompts without it")
        logits, expires_s = self._resident.get(address) or (None, 0.0)
        if logits is None or expires_s < time.monotonic():
            record = await self._cache.get(LOGITS, [address], ttl_s=self._ttl_s)
            if record is None:
                raise RefinementExpired("the refinement token has expired; send the prompts without it")
            logits = record[1][0]
            self._remember(address, logits)
        found: npt.NDArray[np.float16] = logits.numpy()
        return found

    def _remember(self, address: Address, logits: torch.Tensor) -> None:
        evicted = self._resident.put(address, (logits, time.monotonic() + self._ttl_s), 2 * logits.numel())
        self._metrics.evictions.labels("logits").inc(evicted)
        self._metrics.memory_bytes.labels("logits").set(self._resident.used_bytes)
