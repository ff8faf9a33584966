"""The deployments that faults happen to: all of real processes, each with its own Redis behind or beside it."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from bench.faults.deployment import Deployment, RedisServer
from bench.faults.failing_device import FAULT_FOLDER
from bench.faults.proxy import Proxy
from bench.faults.redis_groups import Cluster, RedisGroup, Sentinels
from bench.faults.wall_clock import WallClock

# Twice as fast as fp32 on a CPU, so that a fault meets more calls.
ENCODER = ("--precision", "bf16")
Stage = Callable[[Path], AbstractContextManager[Deployment]]


@contextlib.contextmanager
def plain(folder: Path) -> Iterator[Deployment]:
    """One Redis and two replicas of each service."""
    with Deployment(folder, encoder_args=ENCODER) as deployment:
        yield deployment


@contextlib.contextmanager
def behind_proxy(folder: Path) -> Iterator[Deployment]:
    """The services reach Redis through a proxy."""
    folder.mkdir(parents=True, exist_ok=True)
    server = RedisServer(folder)
    server.start()
    try:
        with Proxy(server.address) as proxy:
            url = server.url.replace(f":{server.address[1]}/", f":{proxy.address[1]}/")
            with Deployment(folder, url, encoder_args=ENCODER, beside=proxy) as deployment:
                yield deployment
    finally:
        server.kill()


def beside_group(make: Callable[[Path], RedisGroup]) -> Stage:
    """Redis is several processes."""

    @contextlib.contextmanager
    def stage(folder: Path) -> Iterator[Deployment]:
        with (
            make(folder / "redis") as group,
            Deployment(folder, group.url, encoder_args=ENCODER, beside=group) as deployment,
        ):
            yield deployment

    return stage


@contextlib.contextmanager
def failing_device(folder: Path) -> Iterator[Deployment]:
    """Replicas whose device fails when a file says so."""
    orders = folder / "orders"
    orders.mkdir(parents=True, exist_ok=True)
    module, environment = "bench.faults.failing_device", {FAULT_FOLDER: str(orders)}
    with Deployment(folder, encoder_args=ENCODER, module=module, environment=environment, beside=orders) as deployment:
        yield deployment


@contextlib.contextmanager
def shifted_clock(folder: Path) -> Iterator[Deployment]:
    """All processes, Redis among them, take the time of day from a file."""
    folder.mkdir(parents=True, exist_ok=True)
    clock = WallClock(folder / "clock")
    with Deployment(folder, encoder_args=ENCODER, environment=clock.environment, beside=clock) as deployment:
        yield deployment


sentinels = beside_group(Sentinels)
cluster = beside_group(Cluster)
