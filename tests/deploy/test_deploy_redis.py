"""The users that the guide has for a Cluster and for Sentinels, in real ones: they may what the cache does, no more."""

import os
import re

import pytest
import redis
import torch
from manifests import DEPLOY

from bench.faults.redis_groups import Cluster, Sentinels
from splitsam.common.cache import RecordCache
from splitsam.common.codecs import FP16
from splitsam.common.keys import Address
from splitsam.common.metrics import Metrics
from splitsam.common.records import LOGITS, SHAPES, RecordHeader, Size

# In the order of the guide: of every Redis, of a Cluster's nodes on top, of Sentinels.
OF_REDIS, OF_NODES, OF_SENTINELS = re.findall(r"^ACL SETUSER .*$", (DEPLOY / "README.md").read_text(), re.M)
PASSWORD = "PASSWORD"
_SLOTS = 16384  # a third for each node


def grant(client: redis.Redis, *lines: str) -> None:
    for line in lines:
        client.execute_command(*line.split(" "))


def refused(client: redis.Redis) -> set[str]:
    """What users were refused, but for commands by which redis-py only says who it is."""
    return {entry["object"] for entry in client.acl_log()} - {"client", "client|setinfo", "hello"}


def limited(url: str) -> str:
    """The URL of a group as the services would have it."""
    return re.sub(r"://:\w+@", f"://splitsam:{PASSWORD}@", url)


def new_header() -> RecordHeader:
    address = Address(os.urandom(16), os.urandom(32))
    return RecordHeader(LOGITS, address, "ab" * 32, FP16, SHAPES[LOGITS], Size(4, 3), Size(1024, 768), 0)


async def use(cache: RecordCache, header: RecordHeader) -> None:
    """Every command of the cache."""
    await cache.ping()
    await cache.measure()
    assert await cache.peek_or_claim(LOGITS, [header.address], ttl_s=60, claim_ms=60_000) == (None, True)
    await cache.put((header, torch.ones(SHAPES[LOGITS])), ttl_s=60)
    await cache.release(header.address)
    assert await cache.peek(LOGITS, [header.address], ttl_s=60) == header
    assert await cache.get(LOGITS, [header.address], ttl_s=60) is not None


async def test_the_user_of_a_cluster_may_do_all_that_the_cache_does(tmp_path, metrics: Metrics):
    with Cluster(tmp_path) as group:
        nodes = [group.client(port) for port in group.ports]
        for node in nodes:
            grant(node, OF_REDIS, OF_NODES)
        cache = RecordCache(limited(group.url), timeout_ms=10_000, connections=2, metrics=metrics)
        for _ in range(12):
            await use(cache, new_header())
        await use(cache, being_moved(nodes))
        await cache.close()
        for node in nodes:
            assert refused(node) == set()
            node.close()


def being_moved(nodes: list[redis.Redis]) -> RecordHeader:
    """A record of the first node whose slot is on its way to the second."""
    ids = [node.execute_command("CLUSTER MYID").decode() for node in nodes]
    slot = _SLOTS
    while slot >= _SLOTS // 3:
        header = new_header()
        slot = nodes[0].execute_command("CLUSTER KEYSLOT", header.address.redis_name("logits"))
    nodes[1].execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[0])
    nodes[0].execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[1])
    return header


async def test_the_users_behind_sentinels_may_do_all_that_the_cache_does(tmp_path, metrics: Metrics):
    with Sentinels(tmp_path) as group:
        servers = [group.client(port) for port in (group.first, group.second)]
        sentinels = [group.client(port, password=None) for port in group.sentinels]
        for server in servers:
            grant(server, OF_REDIS)
        for sentinel in sentinels:
            grant(sentinel, OF_SENTINELS)
        url = f"{limited(group.url)}?sentinel_username=splitsam&sentinel_password={PASSWORD}"
        cache = RecordCache(url, timeout_ms=10_000, connections=2, metrics=metrics)
        await use(cache, new_header())
        await cache.close()
        for client in (*servers, *sentinels):
            assert refused(client) == set()
            client.close()
        with group.client(group.sentinels[0], username="splitsam", password=PASSWORD) as limited_user:
            for command in ("PING", "SENTINEL FAILOVER splitsam", "SENTINEL REMOVE splitsam", "ACL LIST"):
                with pytest.raises(redis.exceptions.NoPermissionError):
                    limited_user.execute_command(*command.split(" "))
