"""A real redis-server in a process of its own, to be stopped, killed and started again by a test."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import redis

from splitsam.client.redis_server import find_redis_server

_READY = b"Ready to accept connections"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition: Callable[[], bool], limit_s: float = 30.0) -> None:
    """For what another process does in its own time; a test that waits for ever fails instead."""
    give_up_s = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > give_up_s:
            raise TimeoutError(f"not so within {limit_s} s")
        os.sched_yield()


def redis_server_with_tls() -> str | None:
    """A redis-server that was built with TLS; the embedded one is not."""
    for program in filter(None, (shutil.which("redis-server"), find_redis_server())):
        # Without TLS the option is unknown; with it, a certificate is missing.
        tried = subprocess.run([program, "--port", "0", "--tls-port", "1"], capture_output=True, text=True, check=False)
        if "Bad directive" not in tried.stdout + tried.stderr:
            return program
    return None


class RedisProcess:
    """redis-server on a loopback port that stays the same over restarts; nothing is written to disk.

    Args:
        tls: certificate, key and authority of callers, PEM files: TLS and nothing else is then spoken.
        program: the embedded one unless given.
        port_words: options among those given whose next word is to be the port.
    """

    def __init__(
        self,
        folder: Path,
        options: Sequence[str] = (),
        *,
        tls: tuple[Path, Path, Path] | None = None,
        program: str | None = None,
        port_words: Sequence[str] = (),
    ):
        self._folder = folder
        self._program = program or find_redis_server()
        self.port = free_port()
        self._options = list(options)
        for word in port_words:
            self._options[self._options.index(word) + 1] = str(self.port)
        if tls is not None:
            names = ("--tls-cert-file", "--tls-key-file", "--tls-ca-cert-file")
            self._options += ["--port", "0", "--tls-port", str(self.port)]
            self._options += [str(word) for pair in zip(names, tls, strict=True) for word in pair]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        command = [self._program, "--bind", "127.0.0.1", "--port", str(self.port)]
        command += ["--save", "", "--appendonly", "no", "--dir", str(self._folder), *self._options]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        lines = []
        while not lines or _READY not in lines[-1]:
            lines.append(self._process.stdout.readline())
            if not lines[-1]:
                self.kill()
                raise RuntimeError(f"redis-server ended: {b''.join(lines).decode()}")

    def kill(self) -> None:
        """End it whatever state it is in; what it held is gone."""
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    def pause(self) -> None:
        """Connections stay open and nothing is answered."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url)

    def holds_unread_bytes(self) -> bool:
        """Whether a client has sent a command that a paused server has not read (Linux)."""
        local = f"0100007F:{self.port:04X}"
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1] == local and fields[3] == "01" and int(fields[4].partition(":")[2], 16):
                return True
        return False
