"""The forms of a Redis URL, and records kept by real Sentinels and a real Cluster while a node goes."""

import asyncio
import select

import pytest
import torch
from redis_process import RedisProcess

from bench.faults.redis_groups import Cluster, Sentinels
from splitsam.common.cache import RecordCache
from splitsam.common.codecs import FP16
from splitsam.common.errors import CacheUnavailable
from splitsam.common.keys import Address
from splitsam.common.records import LOGITS, SHAPES, RecordHeader, Size
from splitsam.common.redis_client import open_redis, parse_place

AGAIN_S = 20.0


@pytest.mark.parametrize(
    ("url", "kind", "hosts", "master"),
    [
        ("redis+sentinel://a:1,b/main", "sentinel", (("a", 1), ("b", 26379)), "main"),
        ("redis+sentinel://[::1]:7/main/2", "sentinel", (("::1", 7),), "main"),
        ("redis+cluster://a,b:2", "cluster", (("a", 6379), ("b", 2)), ""),
        ("redis+cluster://a/0", "cluster", (("a", 6379),), ""),
        ("redis://a:1/2", "", (), ""),
        ("unix:///run/redis.sock", "", (), ""),
    ],
)
def test_url_says_who_is_asked(url, kind, hosts, master):
    place = parse_place(url)
    assert (place.kind, place.hosts, place.master) == (kind, hosts, master)


def test_url_carries_login_database_tls_and_options():
    place = parse_place("rediss+sentinel://me:p%40ss@a/main/3?sentinel_password=other&health_check_interval=5")
    assert (place.options["username"], place.options["password"], place.options["db"]) == ("me", "p@ss", 3)
    assert (place.options["sentinel_password"], place.options["health_check_interval"]) == ("other", 5)
    assert place.options["ssl"] is True
    assert parse_place("rediss+sentinel://a/main?ssl_ca_certs=/ca.crt").options["ssl_ca_certs"] == "/ca.crt"
    assert parse_place("rediss+cluster://a").options["ssl"] is True
    assert "ssl" not in parse_place("redis+cluster://a").options


@pytest.mark.parametrize(
    "url",
    [
        *("http://a", "redis+sentinel://a", "redis+sentinel:///main", "redis+sentinel://a/main/1/2"),
        *(
            "redis://a?no_such_option=1",
            "redis+sentinel://a/main?no_such_option=1",
            "redis+sentinel://a/main?sentinel_x=1",
        ),
        *("rediss://a?ssl_cert_reqs=perhaps", "redis://a?ssl_ca_certs=/without-tls"),
        *("redis+cluster://a/1", "redis+cluster://", "redis+cluster://a:port", "redis+sentinel://a,,b/main", "a:6379"),
    ],
)
def test_other_urls_are_refused(url):
    with pytest.raises(ValueError, match=r"."):
        parse_place(url)


def header_of(number):
    address = Address(bytes(16), number.to_bytes(32, "big"))
    sizes = Size(4, 3), Size(1024, 768)
    return RecordHeader(LOGITS, address, "ab" * 32, FP16, SHAPES[LOGITS], *sizes, 0)


async def put(cache, number):
    await cache.put((header_of(number), torch.full(SHAPES[LOGITS], float(number))), ttl_s=60)


async def claim(cache, number):
    return await cache.peek_or_claim(LOGITS, [header_of(number).address], ttl_s=60, claim_ms=9_000)


async def read(cache, number):
    """The number that was put, or None."""
    record = await cache.get(LOGITS, [header_of(number).address], ttl_s=60)
    return None if record is None else int(record[1][0, 0, 0])


async def until_done(work):
    """What it returns once the cache answers again; the services stay away from a Redis that failed for a second."""
    async with asyncio.timeout(AGAIN_S):
        while True:
            try:
                return await work()
            except CacheUnavailable:
                await asyncio.sleep(0.05)


async def test_sentinels_name_another_master_and_records_go_there(tmp_path, metrics):
    with Sentinels(tmp_path) as group:
        cache = RecordCache(group.url, timeout_ms=500, connections=2, metrics=metrics)
        await put(cache, 1)
        assert await read(cache, 1) == 1
        group.kill(group.first)
        await until_done(lambda: put(cache, 2))
        assert group.master() == group.second
        assert await read(cache, 2) == 2
        assert await claim(cache, 3) == (None, True)
        assert (await cache.peek(LOGITS, [header_of(2).address], ttl_s=60)) == header_of(2)
        await cache.close()


async def test_cluster_keeps_what_its_nodes_own_and_takes_a_node_back(tmp_path, metrics):
    numbers = range(12)
    with Cluster(tmp_path) as group:
        cache = RecordCache(group.url, timeout_ms=500, connections=2, metrics=metrics)
        for number in numbers:
            assert await claim(cache, number) == (None, True)
            assert await claim(cache, number) == (None, False)
            await cache.release(header_of(number).address)
            await put(cache, number)
            assert (await cache.peek(LOGITS, [header_of(number).address], ttl_s=60)) == header_of(number)
        assert [await read(cache, number) for number in numbers] == list(numbers)
        assert (await cache.measure()).used_bytes > 12 * 2**17  # of all nodes
        group.kill(group.ports[0])
        answers = await asyncio.gather(*(read(cache, number) for number in numbers), return_exceptions=True)
        assert any(isinstance(answer, CacheUnavailable) for answer in answers)
        group.restart(group.ports[0])
        for number in numbers:
            await until_done(lambda number=number: put(cache, number))
        assert [await read(cache, number) for number in numbers] == list(numbers)
        await cache.close()


async def test_cluster_that_is_not_there_yet_is_used_when_it_comes(tmp_path, metrics):
    cache = RecordCache("redis+cluster://127.0.0.1:1", timeout_ms=200, connections=1, metrics=metrics)
    with pytest.raises(CacheUnavailable):
        await cache.ping()
    await cache.close()


def leave_reply_unread(pool):
    """What is left of a pipeline whose reply went to another connection."""
    connection = pool.get_connection()
    connection.send_command("ECHO", "left behind")
    pool.release(connection)
    assert select.select([connection._sock], [], [], 10)[0], "its reply has not come"


def test_reply_that_nobody_has_read_is_not_that_of_the_next_command(redis_server: RedisProcess):
    client = open_redis(f"redis://127.0.0.1:{redis_server.port}/0", timeout_s=1.0, connections=1)
    client.ping()
    leave_reply_unread(client.connection_pool)
    assert client.get("nothing") is None
    client.close()


def test_reply_that_nobody_has_read_is_not_that_of_the_next_command_behind_sentinels(tmp_path):
    with Sentinels(tmp_path) as group:
        client = open_redis(group.url, timeout_s=1.0, connections=1)
        client.ping()
        leave_reply_unread(client.connection_pool)
        assert client.get("nothing") is None
        client.close()


def test_reply_that_nobody_has_read_is_not_that_of_the_next_command_in_a_cluster(tmp_path):
    with Cluster(tmp_path) as group:
        client = open_redis(group.url, timeout_s=1.0, connections=1)
        client.get("nothing")
        leave_reply_unread(client.get_node_from_key("nothing").redis_connection.connection_pool)
        assert client.get("nothing") is None
        client.close()
