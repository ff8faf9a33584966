"""Records in a real Redis: found, renewed, verified, and what callers see when Redis is slow, full, gone or back."""

import asyncio
import dataclasses
import os
import time
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace

import pytest
import torch
from redis_process import RedisProcess, wait_until

from bench.relay import Relay
from splitsam.common import cache as cache_module
from splitsam.common import keys as keys_module
from splitsam.common import records as records_module
from splitsam.common.cache import RecordCache
from splitsam.common.codecs import CODECS, FP16, Codec
from splitsam.common.errors import CacheUnavailable
from splitsam.common.keys import Address
from splitsam.common.metrics import Metrics
from splitsam.common.records import EMBEDDING, HEADER_BYTES, LOGITS, SHAPES, RecordHeader, Size, pack_record
from splitsam.common.redis_figures import watch_redis

# Longer than any test runs, and short enough to wait for where Redis is paused.
PATIENT_MS, HASTY_MS = 30_000, 100


class Clock:
    """Stands still until a test moves it."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    times = SimpleNamespace(monotonic=clock.monotonic, perf_counter=time.perf_counter)
    monkeypatch.setattr(cache_module, "time", times)
    return clock


@pytest.fixture
async def connect(metrics: Metrics) -> AsyncIterator[Callable[..., RecordCache]]:
    """Makes a cache on a Redis; closed when the test ends."""
    caches: list[RecordCache] = []

    def make(server: RedisProcess, timeout_ms: int = PATIENT_MS, connections: int = 4) -> RecordCache:
        caches.append(RecordCache(server.url, timeout_ms=timeout_ms, connections=connections, metrics=metrics))
        return caches[-1]

    yield make
    for cache in caches:
        await cache.close()


@pytest.fixture
def cache(connect: Callable[..., RecordCache], redis_server: RedisProcess) -> RecordCache:
    return connect(redis_server)


def new_header(kind: bytes = LOGITS, codec: Codec = FP16) -> RecordHeader:
    """Of a record that no other test has."""
    return RecordHeader(
        kind=kind,
        address=Address(os.urandom(16), os.urandom(32)),
        model_id="0f" * 32,
        codec=codec,
        shape=SHAPES[kind],
        image_size=Size(640, 480),
        input_size=Size(1024, 768),
        orientation=0,
    )


def values(kind: bytes = LOGITS, seed: int = 1) -> torch.Tensor:
    return torch.randn(SHAPES[kind], generator=torch.Generator().manual_seed(seed))


def name(header: RecordHeader) -> str:
    return header.address.redis_name(cache_module.KIND_NAMES[header.kind])


async def put(cache: RecordCache, header: RecordHeader, numbers: torch.Tensor | None = None, ttl_s: int = 60) -> None:
    await cache.put((header, values(header.kind) if numbers is None else numbers), ttl_s=ttl_s, wait_s=60)


async def get(cache: RecordCache, *headers: RecordHeader, ttl_s: int = 60, wait_s: float = 60):
    addresses = [header.address for header in headers]
    return await cache.get(headers[0].kind, addresses, ttl_s=ttl_s, wait_s=wait_s)


async def peek(cache: RecordCache, *headers: RecordHeader, ttl_s: int = 60):
    return await cache.peek(headers[0].kind, [header.address for header in headers], ttl_s=ttl_s, wait_s=60)


async def claim(cache: RecordCache, header: RecordHeader):
    return await cache.peek_or_claim(header.kind, [header.address], ttl_s=60, claim_ms=60_000)


def lookups(metrics: Metrics, result: str, kind: str = "logits") -> float:
    labels = {"kind": kind, "tier": "redis", "result": result}
    return metrics.registry.get_sample_value("splitsam_cache_lookups_total", labels) or 0.0


@pytest.mark.parametrize("codec", CODECS.values(), ids=list(CODECS))
async def test_what_was_put_is_got(cache: RecordCache, metrics: Metrics, codec: Codec):
    header = new_header(EMBEDDING, codec)
    await put(cache, header)
    read, numbers = await get(cache, header)
    assert read == header
    assert codec.write(numbers) == codec.write(values(EMBEDDING))
    assert lookups(metrics, "hit", "embedding") == 1


async def test_a_peek_sends_the_header_and_not_the_payload(
    connect: Callable[..., RecordCache], start_redis: Callable[..., RedisProcess]
):
    server = start_redis()
    cache, header = connect(server), new_header(EMBEDDING)
    await put(cache, header)
    with server.client() as redis:
        before = redis.info("stats")["total_net_output_bytes"]
        assert await peek(cache, header) == header
        assert redis.info("stats")["total_net_output_bytes"] - before < header.payload_bytes / 10


async def test_an_unknown_record_is_a_miss(cache: RecordCache, metrics: Metrics):
    header = new_header()
    assert await get(cache, header) is None
    assert await peek(cache, header) is None
    assert lookups(metrics, "miss") == lookups(metrics, "miss", "header") == 1
    assert lookups(metrics, "hit") == lookups(metrics, "hit", "header") == 0


@pytest.mark.parametrize("read", [get, peek])
async def test_a_read_renews_the_time_to_live(cache: RecordCache, redis_server: RedisProcess, read):
    header = new_header()
    await put(cache, header, ttl_s=60)
    with redis_server.client() as redis:
        assert 0 < redis.ttl(name(header)) <= 60
        assert await read(cache, header, ttl_s=5000) is not None
        assert 60 < redis.ttl(name(header)) <= 5000


@pytest.mark.parametrize("read", [get, peek])
async def test_a_record_is_found_at_its_second_address(cache: RecordCache, read):
    old = new_header()
    await put(cache, old)
    assert await read(cache, new_header(), old) is not None


@pytest.mark.parametrize("read", [get, peek])
@pytest.mark.parametrize(
    "damage", [b"", b"\0" * 200, b"x" * (HEADER_BYTES - 1)], ids=["flipped header", "overwritten", "too short"]
)
async def test_a_damaged_value_is_a_miss_deleted_and_counted(
    cache: RecordCache, metrics: Metrics, redis_server: RedisProcess, read, damage: bytes
):
    header = new_header()
    good = pack_record(header, values())
    with redis_server.client() as redis:
        redis.set(name(header), damage or good[:20] + bytes([good[20] ^ 1]) + good[21:])
        assert await read(cache, header) is None
        assert redis.exists(name(header)) == 0
    assert (lookups(metrics, "bad"), lookups(metrics, "miss", "header" if read is peek else "logits")) == (1, 1)


async def test_a_damaged_payload_is_a_miss_deleted_and_counted(
    cache: RecordCache, metrics: Metrics, redis_server: RedisProcess
):
    header = new_header()
    await put(cache, header)
    with redis_server.client() as redis:
        redis.setrange(name(header), HEADER_BYTES + 100, b"damage")
        assert await get(cache, header) is None
        assert redis.exists(name(header)) == 0
    assert lookups(metrics, "bad") == 1


@pytest.mark.parametrize("read", [get, peek])
async def test_a_record_copied_to_another_tenants_address_is_not_read(
    cache: RecordCache, redis_server: RedisProcess, read
):
    own = new_header()
    foreign = dataclasses.replace(own, address=Address(os.urandom(16), own.address.key))
    await put(cache, own)
    with redis_server.client() as redis:
        redis.copy(name(own), name(foreign))
    assert await read(cache, foreign) is None
    assert await read(cache, own) is not None


async def test_replicas_of_two_schemas_leave_each_others_records_and_claims_alone(
    cache: RecordCache, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
):
    header = new_header()

    def be_of_schema(version: int) -> None:
        for module in (keys_module, records_module):
            monkeypatch.setattr(module, "SCHEMA_VERSION", version)

    for version in (1, 2):
        be_of_schema(version)
        for read in (get, peek):
            assert await read(cache, header) is None
        assert await claim(cache, header) == (None, True)
        await put(cache, header, torch.full(SHAPES[LOGITS], float(version)))
    for version in (1, 2):
        be_of_schema(version)
        assert (await get(cache, header))[1].unique().tolist() == [version]
    assert lookups(metrics, "bad") == 0


async def test_a_claim_is_held_by_one_replica_until_released(
    connect: Callable[..., RecordCache], redis_server: RedisProcess
):
    first, second, header = connect(redis_server), connect(redis_server), new_header()
    assert await claim(first, header) == (None, True)
    assert await claim(second, header) == (None, False)
    await first.release(header.address)
    assert await claim(second, header) == (None, True)


async def test_a_claim_is_given_back_with_the_record_that_it_was_for(
    connect: Callable[..., RecordCache], redis_server: RedisProcess
):
    first, second, header = connect(redis_server), connect(redis_server), new_header()
    assert await claim(first, header) == (None, True)
    await first.put((header, values(header.kind)), ttl_s=60, releases=header.address)
    assert await claim(second, header) == (header, False)
    with redis_server.client() as redis:
        assert not redis.exists(header.address.redis_name("claim"))


async def test_what_the_last_holder_of_a_claim_stored_meanwhile_is_found_with_it(
    cache: RecordCache, connect: Callable[..., RecordCache], redis_server: RedisProcess, monkeypatch
):
    header, other = new_header(), connect(redis_server)
    look, loop = cache._look, asyncio.get_running_loop()

    def look_then_store(*arguments):
        found = look(*arguments)
        monkeypatch.setattr(cache, "_look", look)
        asyncio.run_coroutine_threadsafe(put(other, header), loop).result()
        return found

    monkeypatch.setattr(cache, "_look", look_then_store)
    assert await claim(cache, header) == (header, True)


async def test_a_claim_lapses_by_itself(cache: RecordCache, redis_server: RedisProcess):
    header = new_header()
    await claim(cache, header)
    with redis_server.client() as redis:
        assert 0 < redis.pttl(header.address.redis_name("claim")) <= 60_000


async def test_a_paused_redis_is_unavailable_and_then_not_asked_for_a_second(
    connect: Callable[..., RecordCache], start_redis: Callable[..., RedisProcess], clock: Clock, metrics: Metrics
):
    server = start_redis()
    cache, header = connect(server, HASTY_MS), new_header()
    await put(cache, header)
    server.pause()
    with pytest.raises(CacheUnavailable) as caught:
        await get(cache, header)
    assert caught.value.retry_delay_s
    server.resume()
    with pytest.raises(CacheUnavailable):  # it would answer now; the breaker asks nobody
        await get(cache, header)
    with pytest.raises(CacheUnavailable):
        await cache.ping()
    assert lookups(metrics, "unavailable") == 2
    clock.now_s += 1.0
    assert await get(cache, header) is not None


async def test_a_redis_that_refuses_connections_is_unavailable_and_what_it_did_not_get_is_counted(
    connect: Callable[..., RecordCache], start_redis: Callable[..., RedisProcess], clock: Clock, metrics: Metrics
):
    server = start_redis()
    cache, header = connect(server), new_header(EMBEDDING)
    server.kill()
    for operation in (cache.ping(), put(cache, header), get(cache, header), peek(cache, header)):
        with pytest.raises(CacheUnavailable):
            await operation
        clock.now_s += 1.0
    for operation in (claim(cache, header), cache.release(header.address)):
        with pytest.raises(CacheUnavailable):
            await operation
    labels = {"kind": "embedding", "why": "unavailable"}
    assert metrics.registry.get_sample_value("splitsam_cache_unstored_total", labels) == 1
    server.start()


async def test_a_redis_that_was_killed_and_came_back_empty_serves_again(
    connect: Callable[..., RecordCache], start_redis: Callable[..., RedisProcess], clock: Clock
):
    server = start_redis()
    cache, header = connect(server, connections=2), new_header()
    await put(cache, header)
    await asyncio.gather(get(cache, header), get(cache, header))  # every connection of the pool is in use once
    server.kill()
    with pytest.raises(CacheUnavailable):
        await get(cache, header)
    server.start()
    clock.now_s += 1.0
    assert await get(cache, header) is None
    await put(cache, header)
    assert await get(cache, header) is not None


async def test_a_restart_between_two_calls_is_not_noticed(
    connect: Callable[..., RecordCache], start_redis: Callable[..., RedisProcess]
):
    server = start_redis()
    cache, header = connect(server), new_header()
    await put(cache, header)
    server.kill()
    server.start()
    assert await get(cache, header) is None


@pytest.mark.parametrize("operation", ["put", "get", "peek", "claim"])
async def test_a_name_that_leads_to_another_master_is_followed_there(
    connect: Callable[..., RecordCache], start_redis: Callable[..., RedisProcess], clock: Clock, operation: str
):
    """As managed Redis fails over: the old master stays, as a replica, and so do connections to it."""
    old, new = start_redis("--replica-serve-stale-data", "no"), start_redis()
    header = new_header()
    with Relay(f"127.0.0.1:{old.port}") as relay, old.client() as demoted, new.client() as master:
        cache = connect(SimpleNamespace(url=f"redis://{relay.address}/0"))
        await put(cache, header)
        demoted.replicaof("127.0.0.1", new.port)
        relay.target = f"127.0.0.1:{new.port}"
        calls = {
            "put": lambda: put(cache, header),
            "get": lambda: get(cache, header),
            "peek": lambda: peek(cache, header),
            "claim": lambda: claim(cache, header),
        }
        answers = await asyncio.gather(*(calls[operation]() for _ in range(8)), return_exceptions=True)
        errors = {type(answer) for answer in answers if isinstance(answer, BaseException)}
        assert errors == {CacheUnavailable}  # a connection that had to be made led to the new master
        with pytest.raises(CacheUnavailable):  # the breaker asks nobody
            await cache.ping()
        clock.now_s += 1.0
        await calls[operation]()
        await put(cache, header)
        assert await get(cache, header) is not None
        assert master.exists(name(header))


async def test_a_cancelled_caller_never_leaves_its_reply_to_the_next(
    connect: Callable[..., RecordCache], start_redis: Callable[..., RedisProcess]
):
    server = start_redis()
    cache, first, second = connect(server, connections=1), new_header(EMBEDDING), new_header(EMBEDDING)
    await put(cache, first, values(EMBEDDING, seed=1))
    await put(cache, second, values(EMBEDDING, seed=2))
    for _ in range(3):
        server.pause()
        task = asyncio.create_task(get(cache, first))
        await asyncio.to_thread(wait_until, server.holds_unread_bytes)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        server.resume()
        header, numbers = await get(cache, second)
        assert header == second
        assert torch.equal(numbers, values(EMBEDDING, seed=2).half())


async def test_a_caller_in_a_hurry_does_not_make_others_do_without(
    connect: Callable[..., RecordCache], start_redis: Callable[..., RedisProcess]
):
    server = start_redis()
    cache, header = connect(server), new_header()
    await put(cache, header)
    server.pause()
    with pytest.raises(CacheUnavailable):
        await get(cache, header, wait_s=0.01)
    server.resume()
    assert await get(cache, header) is not None


async def test_a_full_redis_refuses_to_store_and_still_answers(
    connect: Callable[..., RecordCache], start_redis: Callable[..., RedisProcess]
):
    server = start_redis("--maxmemory", "2mb", "--maxmemory-policy", "noeviction")
    cache, headers = connect(server), [new_header() for _ in range(32)]
    outcomes = await asyncio.gather(*(put(cache, header) for header in headers), return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {type(None), CacheUnavailable}
    for header, outcome in zip(headers, outcomes, strict=True):
        assert (await get(cache, header) is None) == isinstance(outcome, CacheUnavailable)


async def test_a_closed_cache_leaves_no_connection_open(start_redis: Callable[..., RedisProcess], metrics: Metrics):
    server = start_redis()
    cache = RecordCache(server.url, timeout_ms=PATIENT_MS, connections=2, metrics=metrics)
    await asyncio.gather(cache.ping(), cache.ping())
    await cache.close()
    with server.client() as redis:
        wait_until(lambda: len(redis.client_list()) == 1)


async def until(condition: Callable[[], object]) -> None:
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError("not so within 30 s")


async def test_figures_of_redis_are_its_own(connect, start_redis, metrics: Metrics):
    server = start_redis("--maxmemory", "8mb", "--maxmemory-policy", "allkeys-lfu")
    with server.client() as connection:
        for number in range(20):
            connection.set(f"splitsam:{number}", bytes(2**20))
    watching = asyncio.create_task(watch_redis(connect(server), metrics))
    value = metrics.registry.get_sample_value
    await until(lambda: value("splitsam_redis_memory_bytes"))
    watching.cancel()
    assert value("splitsam_redis_memory_limit_bytes") == 8 * 2**20
    assert value("splitsam_redis_memory_bytes") <= 9 * 2**20
    assert 10 <= value("splitsam_redis_evicted_records") <= 20


async def test_figures_of_a_user_who_may_not_ask_for_them_are_not_asked_for_again(connect, start_redis, metrics):
    cache = connect(start_redis("--user", "default", "on", "nopass", "~*", "&*", "+@all", "-info"))
    await asyncio.wait_for(watch_redis(cache, metrics), 30)
    await cache.ping()


async def test_figures_of_a_redis_that_is_away_come_when_it_is_back(connect, start_redis, metrics, clock: Clock):
    server = start_redis()
    cache = connect(server)
    server.kill()
    with pytest.raises(CacheUnavailable):
        await cache.measure()
    watching = asyncio.create_task(watch_redis(cache, metrics, period_s=0.01))
    await asyncio.sleep(0)  # it asks, and is refused
    server.start()
    clock.now_s += 2
    await until(lambda: metrics.registry.get_sample_value("splitsam_redis_memory_bytes"))
    watching.cancel()
