"""Everything on one machine: Redis, an encoder and a decoder as child processes that stop together."""

import os
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from splitsam.client.processes import LOOPBACK, Child, StackError, check_port_free, free_ports, stop_all
from splitsam.client.redis_server import redis_url, start_redis, wait_until_answering

ServiceName = Literal["encoder", "decoder"]
_FULL_NAMES = {"encoder": "splitsam.v1.EncoderService", "decoder": "splitsam.v1.DecoderService"}
_REDIS_START_S = 10.0
_POLL_S = 0.1


@dataclass(frozen=True)
class StackSettings:
    """What to start; a port of 0 takes a free one.

    Args:
        encoder_health_port, decoder_health_port: in plaintext, where the stack itself looks, whatever TLS asks for.
        tls_cert_file, tls_key_file, tls_client_ca_file: of both services.
        gateway_port: of the HTTP gateway, which is started if this is not None.
        redis_url: an existing Redis instead of the embedded one.
        redis_memory: from which on the embedded one evicts, as its `maxmemory` is written.
        encoder_args, decoder_args, gateway_args: further arguments of the services.
        run_folder: for logs and the deployment secret; a temporary one, removed after a clean stop, when None.
        start_timeout_s: longest wait for a service to be ready, downloading weights not included.
        stop_timeout_s: longest wait after SIGTERM before SIGKILL.
    """

    encoder_port: int = 50051
    decoder_port: int = 50052
    redis_port: int = 0
    encoder_metrics_port: int = 50061
    decoder_metrics_port: int = 50062
    encoder_health_port: int = 0
    decoder_health_port: int = 0
    gateway_port: int | None = None
    tls_cert_file: Path | None = None
    tls_key_file: Path | None = None
    tls_client_ca_file: Path | None = None
    redis_url: str | None = None
    redis_memory: str = "1gb"
    encoder_args: tuple[str, ...] = ()
    decoder_args: tuple[str, ...] = ()
    gateway_args: tuple[str, ...] = ()
    run_folder: Path | None = None
    start_timeout_s: float = 180.0
    stop_timeout_s: float = 10.0

    def on_free_ports(self) -> "StackSettings":
        """The same with a free port for everything."""
        return self._with_ports(dict.fromkeys(self._ports(), 0))

    def resolved(self) -> "StackSettings":
        """The same with numbers in place of zeros.

        Raises:
            StackError: a port that was asked for is in use.
        """
        ports = {name: getattr(self, name) for name in self._ports()}
        fresh = iter(free_ports(len(ports)))
        for name, port in ports.items():
            if port:
                option = "--gateway" if name == "gateway_port" else "--" + name.replace("_", "-")
                check_port_free(port, f"choose another with {option}, or let --free-ports find free ones")
        return self._with_ports({name: port or next(fresh) for name, port in ports.items()})

    def _ports(self) -> tuple[str, ...]:
        return _PORTS if self.gateway_port is None else (*_PORTS, "gateway_port")

    def _with_ports(self, ports: Mapping[str, Any]) -> "StackSettings":
        return replace(self, **ports)


_PORTS = (
    *("encoder_port", "decoder_port", "redis_port", "encoder_metrics_port", "decoder_metrics_port"),
    *("encoder_health_port", "decoder_health_port"),
)
_TLS_FILES = ("tls_cert_file", "tls_key_file", "tls_client_ca_file")


class Stack:
    """A running deployment, as a context manager; nothing it started outlives it.

    Inside the `with` a child may die without the others being stopped (tests want that); `wait` watches them.
    """

    def __init__(self, settings: StackSettings | None = None):
        self.settings = settings or StackSettings()
        self.children: dict[str, Child] = {}
        self._owns_folder = self.settings.run_folder is None
        self._folder: Path | None = None
        self._password = secrets.token_hex(16)

    @property
    def encoder(self) -> str:
        """host:port of the encoder service."""
        return f"{LOOPBACK}:{self.settings.encoder_port}"

    @property
    def decoder(self) -> str:
        """host:port of the decoder service."""
        return f"{LOOPBACK}:{self.settings.decoder_port}"

    @property
    def gateway(self) -> str:
        """URL of the HTTP gateway."""
        return f"http://{LOOPBACK}:{self.settings.gateway_port}"

    @property
    def redis_url(self) -> str:
        """With the password of the embedded Redis."""
        return self.settings.redis_url or redis_url(self.settings.redis_port, self._password)

    @property
    def folder(self) -> Path:
        """Logs, and the file `secret`."""
        if self._folder is None:
            raise RuntimeError("the stack is not started")
        return self._folder

    def metrics_url(self, service: ServiceName) -> str:
        return f"http://{LOOPBACK}:{getattr(self.settings, f'{service}_metrics_port')}/metrics"

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException as error:
            self.stop(keep_folder=isinstance(error, Exception))
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop(keep_folder=kind is not None and issubclass(kind, Exception))

    def stop(self, *, keep_folder: bool = False) -> None:
        """Stop the services, then Redis; a folder of our own is removed unless it may be of use."""
        redis_child = self.children.pop("redis", None)
        stop_all(list(self.children.values()), self.settings.stop_timeout_s)
        stop_all([redis_child] if redis_child else [], self.settings.stop_timeout_s)
        self.children.clear()
        if self._owns_folder and self._folder is not None and not keep_folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def restart(self, name: ServiceName) -> None:
        """Stop a service if it still runs, start it anew on its port and wait until it is ready."""
        stop_all([self.children[name]], self.settings.stop_timeout_s)
        self.children[name] = self._start_service(name)
        self._wait_until_ready(name, [self.children[name]])

    def wait(self, until: threading.Event | None = None) -> None:
        """Return when the event is set.

        Raises:
            StackError: a child has died.
        """
        event = until or threading.Event()
        while not event.wait(_POLL_S):
            for child in list(self.children.values()):
                child.check_alive("running")

    def _start(self) -> None:
        self.settings = self.settings.resolved()
        self._folder = self.settings.run_folder or Path(tempfile.mkdtemp(prefix="splitsam-"))
        self._folder.mkdir(parents=True, exist_ok=True)
        if not (self._folder / "secret").exists():
            _write_private(self._folder / "secret", secrets.token_hex(32))
        _write_private(self._folder / "redis-url", self.redis_url)
        if self.settings.redis_url is None:
            self.children["redis"] = start_redis(
                self.settings.redis_port, self._password, self._folder, memory=self.settings.redis_memory
            )
            wait_until_answering(self.children["redis"], self.redis_url, _REDIS_START_S)
        for name in _FULL_NAMES:
            self.children[name] = self._start_service(name)
        for name in _FULL_NAMES:
            self._wait_until_ready(name, list(self.children.values()))
        if self.settings.gateway_port is not None:
            self._start_gateway()

    def _start_gateway(self) -> None:
        flags = ["--host", LOOPBACK, "--port", str(self.settings.gateway_port)]
        flags += ["--encoders", self.encoder, "--decoders", self.decoder]
        if self.settings.tls_cert_file is not None:
            flags.append("--service-tls")
        log_format = "SPLITSAM_GATEWAY_LOG_FORMAT"
        child = Child(
            "gateway",
            [sys.executable, "-m", "splitsam.gateway", *flags, *self.settings.gateway_args],
            self.folder / "gateway.log",
            {log_format: os.environ.get(log_format, "text")},
        )
        self.children["gateway"] = child
        self._wait_until(lambda: is_listening(self.settings.gateway_port or 0), child, [child])

    def _start_service(self, name: str) -> Child:
        flags: dict[str, Any] = {
            "--host": LOOPBACK,
            "--port": getattr(self.settings, f"{name}_port"),
            "--metrics-port": getattr(self.settings, f"{name}_metrics_port"),
            "--health-port": getattr(self.settings, f"{name}_health_port"),
            "--secret-file": self.folder / "secret",
            "--redis-url-file": self.folder / "redis-url",
        }
        tls_files = {"--" + file.replace("_", "-"): getattr(self.settings, file) for file in _TLS_FILES}
        flags |= {flag: path for flag, path in tls_files.items() if path is not None}
        log_format = f"SPLITSAM_{name.upper()}_LOG_FORMAT"  # only a default, so no argument
        arguments = [str(word) for pair in flags.items() for word in pair]
        if name == "decoder":
            arguments += self._way_to_encoder()
        return Child(
            f"{name} service",
            [sys.executable, "-m", f"splitsam.{name}_service", *arguments, *getattr(self.settings, f"{name}_args")],
            self.folder / f"{name}.log",
            {log_format: os.environ.get(log_format, "text")},
        )

    def _way_to_encoder(self) -> list[str]:
        """What the decoder needs for calls of its own, but whom to trust there: that is in `decoder_args`."""
        words = ["--encoder-address", self.encoder]
        if self.settings.tls_cert_file is not None:
            words.append("--encoder-tls")
        if self.settings.tls_client_ca_file is not None:
            words += ["--encoder-cert-file", str(self.settings.tls_cert_file)]
            words += ["--encoder-key-file", str(self.settings.tls_key_file)]
        return words

    def _wait_until_ready(self, name: str, watched: Sequence[Child]) -> None:
        child = self.children[name]
        address = f"{LOOPBACK}:{getattr(self.settings, f'{name}_health_port')}"
        self._wait_until(lambda: is_serving(address, _FULL_NAMES[name]), child, watched)

    def _wait_until(self, is_up: Callable[[], bool], child: Child, watched: Sequence[Child]) -> None:
        deadline_s = time.monotonic() + self.settings.start_timeout_s
        while not is_up():
            for each in watched:
                each.check_alive("starting")
            if time.monotonic() > deadline_s:
                waited = f"{self.settings.start_timeout_s:g} s"
                raise StackError(
                    f"the {child.name} is not ready after {waited}; log: {child.log_path}", child.log_tail()
                )
            time.sleep(_POLL_S)


def is_serving(address: str, service: str = "") -> bool:
    """Ask a gRPC health service once; a new channel each time, so that no reconnect backoff delays the answer."""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=2.0)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def is_listening(port: int) -> bool:
    """Whether somebody takes connections on loopback."""
    with socket.socket() as probe:
        probe.settimeout(2.0)
        return probe.connect_ex((LOOPBACK, port)) == 0


def _write_private(path: Path, text: str) -> None:
    """Write a file anew that only this user can read."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
