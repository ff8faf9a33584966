"""Records in Redis: every call bounded in time, every value verified, never on the event loop.

redis-py's blocking client runs on a small thread pool. A caller that stops waiting leaves the thread to finish
its command and read its own reply, so a connection never hands one caller's reply to the next
(https://github.com/redis/redis-py/issues/2624); the header's tenant tag and key are verified all the same.
"""

import asyncio
import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import redis
import torch
from opentelemetry.trace import SpanKind
from redis.cluster import RedisCluster
from redis.exceptions import MasterDownError, NoPermissionError, RedisClusterException

from splitsam.common import tracing
from splitsam.common.calls import share_of_deadline_s
from splitsam.common.errors import CacheUnavailable
from splitsam.common.keys import Address
from splitsam.common.metrics import Metrics
from splitsam.common.records import (
    EMBEDDING,
    HEADER_BYTES,
    LOGITS,
    BadRecord,
    RecordHeader,
    pack_record,
    unpack_header,
    unpack_record,
)
from splitsam.common.redis_client import Client, open_redis

log = logging.getLogger("splitsam.cache")

KIND_NAMES = {EMBEDDING: "embedding", LOGITS: "logits"}
# Peeks are counted apart: they come before encoding, and what was never there says nothing of the room in Redis.
_HEADER_NAME = "header"
_CLAIM = "claim"
_BREAKER_OPEN_S = 1.0
Reply = TypeVar("Reply")


@dataclass(frozen=True)
class RedisFigures:
    """Of one server, or of all that hold records together.

    Args:
        used_bytes: of memory.
        limit_bytes: from which on it evicts; 0 without a limit.
        evicted: records that left to make room since it started.
    """

    used_bytes: int
    limit_bytes: int
    evicted: int


class RecordCache:
    """Embeddings and logits of all tenants in one Redis.

    After a failure, calls are refused at once for a second, so that a dead Redis costs a request no wait.

    Args:
        url: of one server, of Sentinels or of a Cluster; see `redis_client`.
        timeout_ms: longest wait for one round trip.
        connections: connections, and threads to use them.
    """

    def __init__(self, url: str, *, timeout_ms: int, connections: int, metrics: Metrics):
        self._timeout_s = timeout_ms / 1000
        self._metrics = metrics
        self._open = functools.partial(open_redis, url, timeout_s=self._timeout_s, connections=connections)
        self._client: Client | None = None
        self._opening = threading.Lock()
        self._threads = ThreadPoolExecutor(connections, thread_name_prefix="splitsam-redis")
        self._refused_until_s = 0.0

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._client is not None:
            await asyncio.to_thread(self._client.close)

    @property
    def _redis(self) -> Client:
        """The client, on a thread of the cache: opening that of a Cluster asks its nodes."""
        with self._opening:
            if self._client is None:
                self._client = self._open()
            return self._client

    async def ping(self) -> None:
        """Raises CacheUnavailable when Redis does not answer."""
        await self._call("ping", lambda: bool(self._redis.ping()), self._timeout_s)

    async def measure(self) -> RedisFigures:
        """How full Redis is.

        Raises:
            CacheUnavailable: Redis does not answer.
            PermissionError: this user may not ask INFO.
        """

        def ask() -> RedisFigures | None:
            client = self._redis
            options = {"target_nodes": RedisCluster.PRIMARIES} if isinstance(client, RedisCluster) else {}
            try:
                answers = [client.info(section, **options) for section in ("memory", "stats")]
            except NoPermissionError:
                return None
            # A Cluster answers by node.
            memories, counts = ([*answer.values()] if options else [answer] for answer in answers)
            return RedisFigures(
                used_bytes=sum(memory["used_memory"] for memory in memories),
                limit_bytes=sum(memory["maxmemory"] for memory in memories),
                evicted=sum(count["evicted_keys"] for count in counts),
            )

        figures = await self._call("info", ask, self._timeout_s)
        if figures is None:
            raise PermissionError("this user may not ask INFO")
        return figures

    async def get(
        self, kind: bytes, addresses: Sequence[Address], *, ttl_s: int, wait_s: float | None = None
    ) -> tuple[RecordHeader, torch.Tensor] | None:
        """The record at the first address that holds one, verified, its time to live renewed.

        Args:
            kind: EMBEDDING or LOGITS.
            ttl_s: time to live from now on, in seconds.
            wait_s: the longest wait, in seconds; by default half of what is left to the current call.

        Raises:
            CacheUnavailable: Redis does not answer.
        """

        def fetch(address: Address) -> tuple[RecordHeader, torch.Tensor] | None:
            name = address.redis_name(KIND_NAMES[kind])
            data = self._redis.getex(name, ex=ttl_s)
            if not isinstance(data, bytes):
                return None
            return self._verified(name, lambda: unpack_record(data, kind, address))

        return await self._first(KIND_NAMES[kind], fetch, addresses, wait_s)

    async def peek(
        self, kind: bytes, addresses: Sequence[Address], *, ttl_s: int, wait_s: float | None = None
    ) -> RecordHeader | None:
        """As `get`, but reads the header alone: some bytes where the record has megabytes."""
        return await self._first(_HEADER_NAME, functools.partial(self._look, kind, ttl_s), addresses, wait_s)

    async def peek_or_claim(
        self, kind: bytes, addresses: Sequence[Address], *, ttl_s: int, claim_ms: int
    ) -> tuple[RecordHeader | None, bool]:
        """As `peek`; where nothing is found, take the right to encode the first key.

        Returns:
            The header, which whoever had that right may have stored just now; and whether the right is the caller's
            now. With neither, another replica has it.
        """

        def look_or_claim() -> tuple[RecordHeader | None, bool]:
            found = self._look_through(kind, ttl_s, addresses)
            if found is not None or not self._redis.set(addresses[0].redis_name(_CLAIM), b"1", nx=True, px=claim_ms):
                return found, False
            return self._look_through(kind, ttl_s, addresses), True

        try:
            header, claimed = await self._call("claim", look_or_claim, None)
        except CacheUnavailable:
            self._count(_HEADER_NAME, "unavailable")
            raise
        self._count(_HEADER_NAME, "miss" if header is None else "hit")
        return header, claimed

    async def put(
        self,
        *records: tuple[RecordHeader, torch.Tensor],
        ttl_s: int,
        wait_s: float | None = None,
        releases: Address | None = None,
    ) -> None:
        """Store records under their headers' addresses, several in one round trip.

        Args:
            records: headers and values; these of header.shape, any float dtype, on the CPU.
            releases: the key whose claim the caller gives back with it.

        Raises:
            CacheUnavailable: Redis does not answer, or refuses (out of memory); some may be stored.
        """

        def store() -> None:
            client = self._redis  # held: one that nobody holds closes its connections, those in use as well
            pipeline = client.pipeline(transaction=False)
            for header, values in records:
                name = header.address.redis_name(KIND_NAMES[header.kind])
                pipeline.set(name, pack_record(header, values), ex=ttl_s)
            if releases is not None:
                pipeline.delete(releases.redis_name(_CLAIM))
            pipeline.execute()

        try:
            await self._call("set", store, wait_s)
        except CacheUnavailable:
            for header, _ in records:
                self._metrics.cache_unstored.labels(KIND_NAMES[header.kind], "unavailable").inc()
            raise

    async def release(self, address: Address) -> None:
        """Give a claim back; it lapses by itself, too."""
        await self._call("release", lambda: self._redis.delete(address.redis_name(_CLAIM)), None)

    def _look(self, kind: bytes, ttl_s: int, address: Address) -> RecordHeader | None:
        """The header at an address, its record's time to live renewed."""
        name = address.redis_name(KIND_NAMES[kind])
        client = self._redis  # held: one that nobody holds closes its connections, those in use as well
        pipeline = client.pipeline(transaction=False)
        pipeline.getrange(name, 0, HEADER_BYTES - 1)
        pipeline.strlen(name)
        pipeline.expire(name, ttl_s)
        data, size_bytes, _ = pipeline.execute()
        if not isinstance(data, bytes) or not data:
            return None
        return self._verified(name, lambda: unpack_header(data, kind, address, size_bytes))

    def _look_through(self, kind: bytes, ttl_s: int, addresses: Sequence[Address]) -> RecordHeader | None:
        found = (self._look(kind, ttl_s, address) for address in addresses)
        return next((header for header in found if header is not None), None)

    async def _first(
        self, counted: str, fetch: Callable[[Address], Reply | None], addresses: Sequence[Address], wait_s: float | None
    ) -> Reply | None:
        try:
            for address in addresses:
                found = await self._call("get", lambda address=address: fetch(address), wait_s)  # type: ignore[misc]
                if found is not None:
                    self._count(counted, "hit")
                    return found
        except CacheUnavailable:
            self._count(counted, "unavailable")
            raise
        self._count(counted, "miss")
        return None

    def _count(self, counted: str, outcome: str) -> None:
        self._metrics.cache_lookups.labels(counted, "redis", outcome).inc()

    def _verified(self, name: str, unpack: Callable[[], Reply]) -> Reply | None:
        """What unpack makes of the value; a value that does not verify is deleted and counts as a miss."""
        try:
            return unpack()
        except BadRecord as error:
            log.warning("a cached record was bad and is deleted", extra={"record": name, "error": str(error)})
            self._count(name.split(":")[1], "bad")
            self._redis.delete(name)
            return None

    async def _call(self, operation: str, command: Callable[[], Reply], wait_s: float | None) -> Reply:
        """Run a command on a thread and wait for it no longer than wait_s and the timeout."""
        if wait_s is None:
            wait_s = share_of_deadline_s(self._timeout_s)
        if time.monotonic() < self._refused_until_s:
            raise CacheUnavailable("the embedding cache does not answer", retry_delay_s=_BREAKER_OPEN_S)
        start_s = time.perf_counter()
        future = asyncio.get_running_loop().run_in_executor(self._threads, command)
        about = {"db.system.name": "redis", "db.operation.name": operation}
        try:
            with tracing.step(f"redis {operation}", about, kind=SpanKind.CLIENT) as span:
                reply = await asyncio.wait_for(future, max(0.01, min(wait_s, self._timeout_s)))
                if operation == "get":
                    span.set_attribute("splitsam.found", reply is not None)
        except (redis.ReadOnlyError, MasterDownError) as error:
            # It was the master once. Whoever is it now has its name, and new connections lead there.
            self._client = None
            self._refused_until_s = time.monotonic() + _BREAKER_OPEN_S
            log.warning("redis is no master any more", extra={"operation": operation, "error": str(error)})
            message = "the embedding cache changes its master"
            raise CacheUnavailable(message, retry_delay_s=_BREAKER_OPEN_S) from error
        except redis.ResponseError as error:
            # Redis answers and refuses this command (maxmemory without eviction, ACL): no reason to stop asking.
            log.warning("redis refused a command", extra={"operation": operation, "error": str(error)})
            raise CacheUnavailable(f"the embedding cache refused: {operation}", retry_delay_s=1.0) from error
        except (redis.RedisError, RedisClusterException, OSError, TimeoutError) as error:
            if wait_s >= self._timeout_s or not isinstance(error, TimeoutError):  # else the caller was in a hurry
                self._refused_until_s = time.monotonic() + _BREAKER_OPEN_S
            if isinstance(error, redis.AuthenticationError):
                self._client = None  # a connection may have missed its login: see below
            log.warning("redis does not answer", extra={"operation": operation, "error": repr(error)})
            message = "the embedding cache does not answer"
            raise CacheUnavailable(message, retry_delay_s=_BREAKER_OPEN_S) from error
        except Exception as error:
            # A reply that was damaged on its way makes redis-py raise anything, ValueError of a length or
            # AttributeError of a handshake, and keep a connection that is not logged in: begin with new ones.
            self._client = None
            log.warning("redis sent nonsense", extra={"operation": operation}, exc_info=True)
            raise CacheUnavailable("the embedding cache sent nonsense", retry_delay_s=1.0) from error
        self._metrics.cache_seconds.labels(operation).observe(time.perf_counter() - start_s)
        return reply
