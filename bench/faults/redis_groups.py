"""Redis in several processes: a master with a replica and three Sentinels, and a Cluster of three nodes."""

import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import redis

from splitsam.client.processes import LOOPBACK, Child, free_ports, stop_all
from splitsam.client.redis_server import find_redis_server

MASTER = "splitsam"
_START_S = 30.0
_DOWN_AFTER_MS = 1000
_SLOTS = 16384
_PASSWORD = "password"  # noqa: S105 (of a server that lives as long as a test)
_SERVER = (f"bind {LOOPBACK}", 'save ""', "appendonly no", f"requirepass {_PASSWORD}", f"masterauth {_PASSWORD}")


class RedisGroup:
    """Processes by their ports, as a context manager."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._children: dict[int, Child] = {}

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self._build()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def kill(self, port: int) -> None:
        self._children[port].signal(signal.SIGKILL)
        self._children[port].wait(_START_S)

    def restart(self, port: int) -> None:
        """Start one that was killed with the configuration that it has written itself."""
        self._spawn(port, "--sentinel" if (self._folder / f"{port}.conf").read_text().count("sentinel ") else "")
        _wait(lambda: self._answers(port), f"Redis on port {port} answers")

    def client(self, port: int, *, username: str | None = None, password: str | None = _PASSWORD) -> redis.Redis:
        """Of one process, as whoever may do anything there; the Sentinels want no password."""
        return redis.Redis(host=LOOPBACK, port=port, username=username, password=password, socket_timeout=2.0)

    def _build(self) -> None:
        raise NotImplementedError

    def _stop(self) -> None:
        stop_all(list(self._children.values()), 0.0)

    def _start(self, port: int, lines: Sequence[str], mode: str = "") -> None:
        folder = self._folder / str(port)
        folder.mkdir(exist_ok=True)
        (self._folder / f"{port}.conf").write_text("\n".join([f"port {port}", f'dir "{folder}"', *lines]) + "\n")
        self._spawn(port, mode)

    def _spawn(self, port: int, mode: str) -> None:
        command = [find_redis_server(), str(self._folder / f"{port}.conf"), *([mode] if mode else [])]
        self._children[port] = Child(f"redis-{port}", command, self._folder / f"{port}.log")

    def _answers(self, port: int) -> bool:
        try:
            with self.client(port) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False


class Sentinels(RedisGroup):
    """A master, a replica of it, and three Sentinels of which two decide."""

    def _build(self) -> None:
        self.first, self.second, *self.sentinels = free_ports(5)
        self._start(self.first, _SERVER)
        self._start(self.second, (*_SERVER, f"replicaof {LOOPBACK} {self.first}"))
        for port in (self.first, self.second):
            _wait(lambda port=port: self._answers(port), f"Redis on port {port} answers")
        _wait(self._is_replicating, "the replica follows its master")
        lines = (
            f"bind {LOOPBACK}",
            f"sentinel monitor {MASTER} {LOOPBACK} {self.first} 2",
            f"sentinel auth-pass {MASTER} {_PASSWORD}",
            f"sentinel down-after-milliseconds {MASTER} {_DOWN_AFTER_MS}",
            f"sentinel failover-timeout {MASTER} 3000",
        )
        for port in self.sentinels:
            self._start(port, lines, "--sentinel")
        _wait(self._know_each_other, "the Sentinels know each other and the replica")

    @property
    def url(self) -> str:
        hosts = ",".join(f"{LOOPBACK}:{port}" for port in self.sentinels)
        return f"redis+sentinel://:{_PASSWORD}@{hosts}/{MASTER}"

    def master(self) -> int:
        """The port that the first Sentinel names."""
        with redis.Redis(host=LOOPBACK, port=self.sentinels[0], socket_timeout=2.0) as sentinel:
            return int(sentinel.sentinel_get_master_addr_by_name(MASTER)[1])

    def _is_replicating(self) -> bool:
        with self.client(self.second) as client:
            return client.info("replication").get("master_link_status") == "up"

    def _know_each_other(self) -> bool:
        try:
            for port in self.sentinels:
                with redis.Redis(host=LOOPBACK, port=port, socket_timeout=2.0) as sentinel:
                    state = sentinel.sentinel_master(MASTER)
                    if int(state["num-other-sentinels"]) < 2 or int(state["num-slaves"]) < 1:
                        return False
        except redis.RedisError:
            return False
        return True


class Cluster(RedisGroup):
    """Three masters, each with a third of the slots; those of a node that is away are missed."""

    def _build(self) -> None:
        # A node's bus listens 10000 above it.
        self.ports = [port for port in free_ports(20) if port < 2**16 - 10_000][:3]
        for port in self.ports:
            lines = ("cluster-enabled yes", "cluster-require-full-coverage no", "cluster-node-timeout 2000")
            self._start(port, (*_SERVER, *lines))
        for port in self.ports:
            _wait(lambda port=port: self._answers(port), f"Redis on port {port} answers")
        bounds = [round(_SLOTS * share / 3) for share in range(4)]
        for number, port in enumerate(self.ports):
            with self.client(port) as client:
                client.execute_command("CLUSTER ADDSLOTS", *range(bounds[number], bounds[number + 1]))
                client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
        with self.client(self.ports[0]) as client:
            for port in self.ports[1:]:
                client.execute_command("CLUSTER MEET", LOOPBACK, port)
        _wait(self._is_whole, "every node knows the owner of every slot")

    @property
    def url(self) -> str:
        hosts = ",".join(f"{LOOPBACK}:{port}" for port in self.ports)
        return f"redis+cluster://:{_PASSWORD}@{hosts}"

    def _is_whole(self) -> bool:
        for port in self.ports:
            with self.client(port) as client:
                info = client.cluster("info")
                if info["cluster_state"] != "ok" or int(info["cluster_slots_ok"]) != _SLOTS:
                    return False
        return True


def _wait(condition: Callable[[], bool], what: str) -> None:
    end_s = time.monotonic() + _START_S
    while not condition():
        if time.monotonic() > end_s:
            raise TimeoutError(f"not within {_START_S:g} s: {what}")
        time.sleep(0.05)
