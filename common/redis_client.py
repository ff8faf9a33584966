"""A blocking Redis client for a URL: one server, the master that Sentinels name, or a Cluster.

    redis://host:6379/0                              also rediss:// (TLS) and unix://
    redis+sentinel://host:26379,host:26379/mymaster  also rediss+sentinel://; /mymaster/1 for database 1
    redis+cluster://host:6379,host:6379              also rediss+cluster://; any of its nodes will do

User and password stand before the hosts as usual; options of redis-py after a question mark, and `sentinel_username`
and `sentinel_password` where the Sentinels have their own.
"""

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.connection import PythonRespSerializer, parse_url
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry
from redis.sentinel import Sentinel

SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")
_SENTINEL_PORT, _REDIS_PORT = 26379, 6379
# Pools that wait for notices of maintenance do not look whether a connection holds a reply that nobody has read, and
# every command on such a connection gets the reply of the one before (redis-py 8.1.0).
_NO_NOTICES = MaintNotificationsConfig(enabled=False)
# What is longer is sent as it is, behind its command: hiredis would copy an embedding twice, and Python stand still.
_COPIED_BYTES = 6000
_OF_SENTINELS = ("sentinel_username", "sentinel_password")
Client = redis.Redis | RedisCluster


@dataclass(frozen=True)
class Place:
    """What a URL says.

    Args:
        kind: empty for one server, `sentinel` or `cluster`.
        hosts: names and ports, at least one for the last two.
        master: the name that the Sentinels know the master by.
        options: for redis-py's connections.
    """

    kind: str
    hosts: tuple[tuple[str, int], ...]
    master: str
    options: dict[str, Any]


def parse_place(url: str) -> Place:
    """Read a URL.

    Raises:
        ValueError: it is not of the forms above.
    """
    scheme, _, rest = url.partition("://")
    if scheme not in SCHEMES:
        raise ValueError(f"the scheme of a Redis URL is one of {', '.join(SCHEMES)}")
    transport, _, kind = scheme.partition("+")
    if not kind:
        return Place("", (), "", _checked(parse_url(url)))  # type: ignore[no-untyped-call]
    split = urlsplit(f"redis://{rest}")
    login, at, netloc = split.netloc.rpartition("@")
    path = [part for part in split.path.split("/") if part]
    master = path.pop(0) if kind == "sentinel" and path else ""
    hosts = tuple(_host(text, _SENTINEL_PORT if kind == "sentinel" else _REDIS_PORT) for text in netloc.split(","))
    if (kind == "sentinel") != bool(master) or (kind == "cluster" and path not in ([], ["0"])) or len(path) > 1:
        raise ValueError("Sentinels need the name of a master, redis+sentinel://host/name; a Cluster has no databases")
    tail = f"{login}{at}host/{'/'.join(path)}?{split.query}"
    options = parse_url(f"redis://{tail}")  # type: ignore[no-untyped-call]
    if kind == "sentinel":  # a Cluster's client takes options of its own
        _checked(parse_url(f"{transport}://{tail}"))  # type: ignore[no-untyped-call]
    del options["host"]
    if transport == "rediss":
        options["ssl"] = True
    return Place(kind, hosts, master, options)


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """The same, if redis-py knows them all but those of Sentinels; nothing is connected."""
    known = {name: value for name, value in options.items() if name not in _OF_SENTINELS}
    make_pool: Any = redis.BlockingConnectionPool
    try:
        make_pool(**known).make_connection()
    except (TypeError, redis.RedisError) as error:
        raise ValueError("an option after the question mark is none of redis-py's") from error
    return options


def _host(text: str, default_port: int) -> tuple[str, int]:
    split = urlsplit(f"//{text}")
    if not split.hostname:
        raise ValueError("a host is missing")
    return split.hostname, split.port or default_port


def open_redis(url: str, *, timeout_s: float, connections: int) -> Client:
    """A client that fails within about `timeout_s` and sends nothing again by itself. A Cluster is asked for its nodes.

    Raises:
        ValueError: as `parse_place`.
        redis.RedisError, redis.exceptions.RedisClusterException: no node of a Cluster answers.
    """
    place = parse_place(url)
    options: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "socket_read_size": 2**20,
    }
    options |= place.options
    if place.kind == "cluster":
        nodes = [ClusterNode(host, port) for host, port in place.hosts]  # type: ignore[no-untyped-call]
        return RedisCluster(
            startup_nodes=nodes,
            # The slots of a node that is away are missed, not those of the others.
            require_full_coverage=False,
            retry=Retry(NoBackoff(), 1),  # once more after a node has gone, at the one that took over
            max_connections=connections,
            maint_notifications_config=_NO_NOTICES,
            **options,
        )
    options["command_packer"] = PythonRespSerializer(_COPIED_BYTES, _encode)
    if place.kind == "sentinel":
        return _of_sentinels(place, options, connections)
    pool = redis.BlockingConnectionPool.from_url(
        url,
        max_connections=connections,
        timeout=timeout_s,
        retry=Retry(NoBackoff(), 0),
        maint_notifications_config=_NO_NOTICES,
        **{name: value for name, value in options.items() if name not in place.options},
    )
    return redis.Redis.from_pool(pool)


def _encode(value: bytes | str | float) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def _of_sentinels(place: Place, options: dict[str, Any], connections: int) -> redis.Redis:
    """The master's client; each new connection asks the Sentinels who that is."""
    once = Retry(NoBackoff(), 0)
    own = {name: options.pop(f"sentinel_{name}", None) for name in ("username", "password")}
    shared = {name: value for name, value in options.items() if name.startswith(("socket_", "ssl"))}
    manager: Any = Sentinel
    sentinels = manager(list(place.hosts), sentinel_kwargs={**shared, **own, "retry": once})
    options |= {"max_connections": connections, "maint_notifications_config": _NO_NOTICES}
    client: redis.Redis = sentinels.master_for(place.master, retry=once, **options)
    return client
