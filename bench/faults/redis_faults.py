"""What can happen to Redis."""

import contextlib
import signal
import time
from collections.abc import Iterator

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
    """Both services start while there is no Redis."""
    deployment.redis.kill()
    for replica in deployment.all:
        replica.terminate()
        replica.start()
    deployment.until_ready()
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
