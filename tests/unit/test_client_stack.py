"""The embedded Redis, and a stack that cannot start; a stack that can is the end-to-end tests' subject."""

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from splitsam.client import redis_server
from splitsam.client.processes import StackError, free_ports, stop_all
from splitsam.client.redis_server import find_redis_server, redis_url, start_redis, wait_until_answering
from splitsam.client.stack import Stack, StackSettings

ONCE = Retry(NoBackoff(), 0)


@pytest.fixture
def embedded(tmp_path):
    (port,) = free_ports(1)
    child = start_redis(port, "secret", tmp_path)
    wait_until_answering(child, redis_url(port, "secret"), timeout_s=20)
    yield port, child
    stop_all([child], timeout_s=20)


def test_redis_is_a_cache_on_loopback_with_a_password(embedded):
    port, _ = embedded
    names = ("bind", "save", "appendonly", "maxmemory", "maxmemory-policy")
    with redis.Redis.from_url(redis_url(port, "secret"), decode_responses=True) as client:
        settings = {name: client.config_get(name)[name] for name in names}
    assert settings == {
        "bind": "127.0.0.1",
        "save": "",
        "appendonly": "no",
        "maxmemory": str(2**30),
        "maxmemory-policy": "allkeys-lfu",
    }
    with redis.Redis(port=port, retry=ONCE) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()


def test_redis_password_is_no_argument(embedded):
    _, child = embedded
    command = Path(f"/proc/{child.pid}/cmdline").read_bytes()
    assert b"redis-server" in command
    assert b"secret" not in command


def test_no_redis_server_says_what_to_do(monkeypatch):
    monkeypatch.setattr(redis_server.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(redis_server.shutil, "which", lambda name: None)
    with pytest.raises(StackError, match="install redis"):
        find_redis_server()


def test_redis_server_of_the_path_is_the_second_choice(monkeypatch):
    monkeypatch.setattr(redis_server.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(redis_server.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert find_redis_server() == "/usr/bin/redis-server"


def test_port_in_use_is_named_with_its_option(embedded):
    port, _ = embedded
    free = StackSettings().on_free_ports()
    with pytest.raises(StackError, match=f"port {port} .* --decoder-port"):
        replace(free, decoder_port=port).resolved()


def test_free_ports_are_all_different():
    settings = StackSettings(gateway_port=8080).on_free_ports().resolved()
    ports = [getattr(settings, name) for name in vars(settings) if name.endswith("_port")]
    assert len(set(ports)) == len(ports) == 8
    assert StackSettings().on_free_ports().resolved().gateway_port is None
    assert all(ports)


def test_service_that_cannot_start_stops_everything_and_shows_why(tmp_path):
    settings = StackSettings(run_folder=tmp_path, encoder_args=("--device", "abacus"))
    stack = Stack(settings.on_free_ports())
    with pytest.raises(StackError, match="encoder service exited with status 2 while starting") as caught, stack:
        pass
    assert any("device" in line for line in caught.value.log_tail)
    assert stack.children == {}
    with redis.Redis.from_url(stack.redis_url, retry=ONCE) as client, pytest.raises(redis.ConnectionError):
        client.ping()
    secret = tmp_path / "secret"
    assert stat.S_IMODE(os.stat(secret).st_mode) == 0o600
    assert len(secret.read_text()) == 64
