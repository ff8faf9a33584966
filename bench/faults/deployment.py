"""A deployment to be hurt: a Redis of its own and replicas of both services, each a process on a port that stays."""

import contextlib
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from splitsam.client.processes import LOOPBACK, Child, free_ports, stop_all
from splitsam.client.redis_server import redis_url, start_redis, wait_until_answering
from splitsam.client.stack import is_serving

READY_S = 120.0
_POLL_S = 0.05
_STOP_S = 60.0


class Replica:
    """One encoder or decoder process.

    Args:
        service: `encoder` or `decoder`.
        redis: URL.
        module: run in place of the service's own, for those with a defect built in.
        environment: variables on top of this process's own.
    """

    def __init__(
        self,
        service: str,
        folder: Path,
        redis: str,
        arguments: Sequence[str] = (),
        module: str | None = None,
        environment: dict[str, str] | None = None,
    ):
        port, metrics_port = free_ports(2)
        self.name = f"{service}-{port}"
        self.port = port
        self.address = f"{LOOPBACK}:{port}"
        self.metrics_url = f"http://{LOOPBACK}:{metrics_port}/metrics"
        self.log_path = folder / f"{self.name}.log"
        self._command = [
            *(sys.executable, "-m", *((module, service) if module else (f"splitsam.{service}_service",))),
            *("--host", LOOPBACK, "--port", str(port), "--metrics-port", str(metrics_port), *arguments),
        ]
        prefix = f"SPLITSAM_{service.upper()}_"
        self._environment = {prefix + "REDIS_URL": redis, prefix + "LOG_FORMAT": "text", **(environment or {})}
        self.crashes = 0
        self._may_end = False
        self.start()

    def start(self) -> None:
        self._may_end = False
        self._child = Child(self.name, self._command, self.log_path, self._environment)

    def is_ready(self) -> bool:
        return self.exit_status() is None and is_serving(self.address)

    def until_ready(self, limit_s: float = READY_S) -> None:
        end_s = time.monotonic() + limit_s
        while not self.is_ready():
            self._child.check_alive("starting")
            if time.monotonic() > end_s:
                raise TimeoutError(f"{self.name} is not ready after {limit_s:g} s: {self._child.log_tail()}")
            time.sleep(_POLL_S)

    def exit_status(self) -> int | None:
        """None while it runs. An end that nobody asked for counts as a crash, once."""
        status = self._child.exit_status()
        if status is not None and not self._may_end:
            self._may_end = True
            self.crashes += 1
        return status

    @property
    def pid(self) -> int:
        return self._child.pid

    def may_end(self) -> None:
        """From now on its end is no crash."""
        self._may_end = True

    def kill(self) -> None:
        self._may_end = True
        self._child.signal(signal.SIGKILL)
        self._child.wait(_STOP_S)

    def wait(self, timeout_s: float) -> bool:
        """Wait for its end; False when it still runs."""
        return self._child.wait(timeout_s)

    def terminate(self) -> None:
        """As a rollout does: SIGTERM, and wait for the end; a status other than 0 is a crash."""
        self._may_end = True
        stop_all([self._child], _STOP_S)
        if self._child.exit_status() != 0:
            self.crashes += 1


class RedisServer:
    """A redis-server without a disk, to be paused, killed and started again."""

    def __init__(self, folder: Path, environment: dict[str, str] | None = None):
        self._folder = folder
        self._environment = environment
        self._port = free_ports(1)[0]
        self.url = redis_url(self._port, "password")
        self.address = (LOOPBACK, self._port)
        self._child: Child | None = None

    def start(self) -> None:
        """Start it, empty."""
        self._child = start_redis(self._port, "password", self._folder, self._environment)
        wait_until_answering(self._child, self.url, READY_S)

    def signal(self, number: int) -> None:
        if self._child is not None:
            self._child.signal(number)

    def kill(self) -> None:
        if self._child is not None:
            self._child.signal(signal.SIGKILL)
            self._child.wait(_STOP_S)


@dataclass
class Deployment:
    """Redis and replicas, as a context manager; everything is stopped at its end.

    Args:
        redis_url: instead of a Redis of its own.
        with_redis: whether its own Redis is started at once.
        replicas: of each service.
        encoder_args, decoder_args: arguments of the services.
        module: see `Replica`.
        environment: of the services, and of its own Redis.
        beside: what the faults of this deployment turn on and off: a proxy, other servers, a file.
    """

    folder: Path
    redis_url: str | None = None
    with_redis: bool = True
    replicas: int = 2
    encoder_args: Sequence[str] = ()
    decoder_args: Sequence[str] = ()
    module: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    beside: Any = None

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.redis = RedisServer(self.folder, self.environment)
        self.encoders: list[Replica] = []
        self.decoders: list[Replica] = []
        try:
            if self.with_redis and self.redis_url is None:
                self.redis.start()
            url = self.redis_url or self.redis.url
            for _ in range(self.replicas):
                made = (self.module, self.environment)
                self.encoders.append(Replica("encoder", self.folder, url, self.encoder_args, *made))
                self.decoders.append(Replica("decoder", self.folder, url, self.decoder_args, *made))
            self.until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def all(self) -> list[Replica]:
        return [*self.encoders, *self.decoders]

    def until_ready(self) -> None:
        for replica in self.all:
            replica.until_ready()

    def stop(self) -> None:
        for replica in self.all:
            with contextlib.suppress(ProcessLookupError):
                replica.kill()
        self.redis.signal(signal.SIGCONT)
        self.redis.kill()
