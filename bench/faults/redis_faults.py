"""What can happen to Redis."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator

import redis

from bench.faults.deployment import Deployment


@contextlib.contextmanager
def kill_redis(deployment: Deployment) -> Iterator[None]:
    """Gone, connections refused; back empty."""
    deployment.redis.kill()
    yield
    deployment.redis.start()


@contextlib.contextmanager
def stall_redis(deployment: Deployment) -> Iterator[None]:
    """SIGSTOP: connections stay open and are accepted, nothing is answered."""
    deployment.redis.signal(signal.SIGSTOP)
    yield
    deployment.redis.signal(signal.SIGCONT)


@contextlib.contextmanager
def restart_redis_empty(deployment: Deployment) -> Iterator[None]:
    """Away for as long as a restart takes, three times."""
    for _ in range(3):
        deployment.redis.kill()
        deployment.redis.start()
        time.sleep(1.0)
    yield


@contextlib.contextmanager
def refuse_redis_at_start(deployment: Deployment) -> Iterator[None]:
    """Every replica starts while there is no Redis, one after the other."""
    deployment.redis.kill()
    for replica in deployment.all:
        replica.terminate()
        replica.start()
        replica.until_ready()
    yield
    deployment.redis.start()


@contextlib.contextmanager
def evict(deployment: Deployment) -> Iterator[None]:
    """Room for one embedding, so that most are gone before they are clicked on."""
    with _configured(deployment, maxmemory="6mb", **{"maxmemory-policy": "allkeys-lru"}):
        yield


@contextlib.contextmanager
def refuse_writes(deployment: Deployment) -> Iterator[None]:
    """Full, and nothing may be evicted."""
    with _configured(deployment, maxmemory="1mb", **{"maxmemory-policy": "noeviction"}):
        yield


@contextlib.contextmanager
def _configured(deployment: Deployment, **settings: str) -> Iterator[None]:
    with redis.Redis.from_url(deployment.redis.url) as connection:
        before = {name: connection.config_get(name)[name] for name in settings}
        for name, value in settings.items():
            connection.config_set(name, value)
        yield
        for name, value in before.items():
            connection.config_set(name, value)


def damage_replies(how: str) -> Callable[[Deployment], contextlib.AbstractContextManager[None]]:
    """See `Proxy`."""

    @contextlib.contextmanager
    def inject(deployment: Deployment) -> Iterator[None]:
        deployment.beside.set(how)
        yield
        deployment.beside.set("nothing")

    return inject


@contextlib.contextmanager
def fail_over(deployment: Deployment) -> Iterator[None]:
    """The master is killed, the Sentinels choose the replica; the old master comes back as a replica."""
    group = deployment.beside
    old = group.master()
    group.kill(old)
    while group.master() == old:
        time.sleep(0.05)
    yield
    group.restart(old)


@contextlib.contextmanager
def kill_node(deployment: Deployment) -> Iterator[None]:
    """A third of the keys have no server."""
    port = deployment.beside.ports[0]
    deployment.beside.kill(port)
    yield
    deployment.beside.restart(port)


def shift_clock(seconds: int) -> Callable[[Deployment], contextlib.AbstractContextManager[None]]:
    """The time of day jumps for the services and Redis, and back; for Redis, embeddings age by as much."""

    @contextlib.contextmanager
    def inject(deployment: Deployment) -> Iterator[None]:
        deployment.beside.shift(seconds)
        yield
        deployment.beside.shift(0)

    return inject
