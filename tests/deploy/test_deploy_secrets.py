"""Secrets: placeholders left are refused, made ones are accepted; Redis grants what is needed and no more."""

import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import redis
import torch
from manifests import DEPLOY, KUSTOMIZE, build, container_of, load, size_bytes
from redis_process import RedisProcess, free_port, redis_server_with_tls

from splitsam.client.redis_server import find_redis_server
from splitsam.common.auth import Authenticator
from splitsam.common.cache import RecordCache
from splitsam.common.codecs import FP16
from splitsam.common.keys import Address
from splitsam.common.metrics import Metrics
from splitsam.common.records import EMBEDDING, SHAPES, RecordHeader, Size
from splitsam.common.settings import SettingsProblem
from splitsam.encoder_service.settings import EncoderSettings


def values(manifests) -> dict[str, str]:
    """All keys of the Secrets with their values."""
    return dict(itertools.chain.from_iterable(item["stringData"].items() for item in manifests))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, str]:
    """What deploy/make-secrets writes for two tenants."""
    path = tmp_path_factory.mktemp("secrets") / "secrets.yaml"
    with path.open("w") as file:
        subprocess.run([DEPLOY / "make-secrets", "alice", "bob"], stdout=file, check=True, timeout=30)
    return values(load(path))


@pytest.fixture(scope="module")
def example() -> dict[str, str]:
    return values(load(DEPLOY / "secrets.example.yaml"))


def read_by_the_services(secrets: dict[str, str], folder: Path) -> Authenticator:
    """What a service does with its secrets at start."""
    for name in ("secret", "tokens", "url"):
        (folder / name).write_text(secrets[name])
    arguments = ["--secret-file", str(folder / "secret"), "--tokens-file", str(folder / "tokens")]
    settings = EncoderSettings.load([*arguments, "--redis-url-file", str(folder / "url")])
    settings.key_ring()
    settings.redis_address()
    return Authenticator(settings.tokens_file, Metrics())


def redis_options(acl: Path) -> list[str]:
    """The configuration of the Redis in the cluster, but where it listens, as options."""
    lines = (KUSTOMIZE / "components" / "redis" / "redis.conf").read_text().splitlines()
    words = [line.replace('""', "").split(" ") for line in lines if line and not line.startswith("#")]
    options = [(name, values) for name, *values in words if name not in ("bind", "port", "aclfile")]
    assert len(options) < len(words)
    maxmemory = container_of(build("cpu-kind"), "redis")["args"]
    return [word for name, values in options for word in (f"--{name}", *values)] + [*maxmemory, "--aclfile", str(acl)]


def test_made_secrets_are_accepted(made, tmp_path):
    authenticator = read_by_the_services(made, tmp_path)
    tokens = dict(line.split() for line in made["tokens"].splitlines())
    assert tokens.keys() == {"alice", "bob"}
    assert authenticator.tenant({"authorization": f"Bearer {tokens['bob']}"}) == "bob"
    assert not any("REPLACE" in value for value in made.values())


@pytest.mark.parametrize("left", ["secret", "tokens", "url"])
def test_a_placeholder_that_is_left_is_refused_by_the_services(made, example, tmp_path, left):
    assert "REPLACE" in example[left]
    with pytest.raises(SettingsProblem):
        read_by_the_services({**made, left: example[left]}, tmp_path)


def test_a_placeholder_that_is_left_is_refused_by_redis(example, tmp_path):
    acl = tmp_path / "users.acl"
    acl.write_text(example["users.acl"])
    command = [find_redis_server(), "--bind", "127.0.0.1", "--port", str(free_port()), *redis_options(acl)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert result.returncode != 0
    assert "users.acl" in result.stdout


def test_every_key_of_the_example_is_made(made, example):
    assert made.keys() == example.keys()


def test_tenant_names_that_would_break_the_file_are_refused():
    for arguments in ([], ["two words"], ["slash/"]):
        result = subprocess.run([DEPLOY / "make-secrets", *arguments], capture_output=True, check=False, timeout=30)
        assert result.returncode == 2


@pytest.fixture(scope="module")
def server(made, tmp_path_factory):
    """The Redis in the cluster, with one more user who may look."""
    folder = tmp_path_factory.mktemp("redis")
    acl = folder / "users.acl"
    acl.write_text(f"{made['users.acl']}user watcher on nopass ~* &* +@all\n")
    server = RedisProcess(folder, redis_options(acl))
    yield server
    server.kill()


def url_on_loopback(made, server) -> str:
    return made["url"].replace("splitsam-redis:6379", f"127.0.0.1:{server.port}")


async def test_the_services_user_may_do_all_that_the_cache_does(made, server):
    cache = RecordCache(url_on_loopback(made, server), timeout_ms=30_000, connections=2, metrics=Metrics())
    address = Address(os.urandom(16), os.urandom(32))
    header = RecordHeader(
        kind=EMBEDDING,
        address=address,
        model_id="0f" * 32,
        codec=FP16,
        shape=SHAPES[EMBEDDING],
        image_size=Size(640, 480),
        input_size=Size(1024, 768),
        orientation=0,
    )
    await cache.ping()
    assert await cache.peek_or_claim(EMBEDDING, [address], ttl_s=60, claim_ms=60_000) == (None, True)
    await cache.put((header, torch.ones(SHAPES[EMBEDDING])), ttl_s=60, wait_s=30)
    await cache.release(address)
    assert await cache.peek(EMBEDDING, [address], ttl_s=60, wait_s=30) == header
    found = await cache.get(EMBEDDING, [address], ttl_s=60, wait_s=30)
    assert found is not None
    assert torch.equal(found[1].float(), torch.ones(SHAPES[EMBEDDING]))
    await cache.close()
    with redis.Redis.from_url(f"redis://watcher:any@127.0.0.1:{server.port}/0") as watcher:
        # redis-py may try commands that only tell the server who it is, and goes on when they are refused.
        refused = {entry["object"] for entry in watcher.acl_log() if entry["username"] == "splitsam"}
        assert all(name.startswith(("client|", "hello", "client")) for name in refused)


def test_the_services_user_may_do_nothing_else(made, server):
    with redis.Redis.from_url(url_on_loopback(made, server)) as client:
        for command in (["SET", "another", "1"], ["KEYS", "*"], ["FLUSHALL"], ["CONFIG", "GET", "*"], ["ACL", "LIST"]):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command)


def test_the_probes_user_may_ping_and_nobody_may_come_without_a_name(server):
    address = f"127.0.0.1:{server.port}/0"
    with redis.Redis.from_url(f"redis://probe:any@{address}") as probe:
        assert probe.ping()
        with pytest.raises(redis.exceptions.NoPermissionError):
            probe.get("splitsam:embedding:x")
    with redis.Redis.from_url(f"redis://{address}") as nobody, pytest.raises(redis.exceptions.AuthenticationError):
        nobody.ping()


def test_redis_evicts_keeps_nothing_and_stays_under_its_limit(server):
    with redis.Redis.from_url(f"redis://watcher:any@127.0.0.1:{server.port}/0") as watcher:
        configuration = watcher.config_get("*")
        assert configuration["maxmemory-policy"] == "allkeys-lfu"
        assert configuration["save"] == ""
        assert configuration["appendonly"] == "no"
        assert int(configuration["maxmemory"]) == size_bytes(container_of(build("cpu-kind"), "redis")["args"][1])


@pytest.mark.parametrize("variant", ["cpu-kind", "gpu"])
def test_redis_has_room_above_maxmemory(variant):
    container = container_of(build(variant), "redis")
    name, maxmemory = container["args"]
    assert name == "--maxmemory"
    assert size_bytes(maxmemory) <= 0.75 * size_bytes(container["resources"]["limits"]["memory"])


def test_redis_speaks_tls_to_services_and_probes(made, tmp_path, authority):
    """With the component's own arguments and probe, files and port replaced, and the URL that the guide makes."""
    program = redis_server_with_tls()
    if program is None:
        pytest.skip("no redis-server with TLS: the embedded one has none, Debian's package redis-server has")
    pair = authority.issue("redis", hosts=("127.0.0.1",))
    for name, content in (("tls.crt", pair.cert_pem), ("tls.key", pair.key_pem), ("ca.crt", authority.cert_pem)):
        (tmp_path / name).write_bytes(content)
    acl = tmp_path / "users.acl"
    acl.write_text(made["users.acl"])
    container = container_of(build("gpu with TLS"), "redis")
    options = [word.replace("/etc/redis/tls", str(tmp_path)) for word in container["args"]]
    server = RedisProcess(tmp_path, ["--aclfile", str(acl), *options], program=program, port_words=("--tls-port",))
    try:
        sed = re.search(r"make-secrets demo \| (sed .*)", (DEPLOY / "README.md").read_text())[1].partition(" >")[0]
        changed = subprocess.run(
            [shutil.which("bash"), "-c", sed],
            input=f"  url: {made['url']}\n",
            capture_output=True,
            text=True,
            check=True,
        )
        url = changed.stdout.strip().removeprefix("url: ")
        mount = container_of(build("gpu with TLS"), "encoder")["volumeMounts"]
        [folder] = [item["mountPath"] for item in mount if item["name"] == "redis-tls"]
        assert url.endswith(f"?ssl_ca_certs={folder}/ca.crt")
        here = url.replace(folder, str(tmp_path)).replace("splitsam-redis:6379", f"127.0.0.1:{server.port}")
        with redis.Redis.from_url(here) as client:
            assert client.ping()
        if shutil.which("redis-cli"):
            probe = container["readinessProbe"]["exec"]["command"]
            script = probe[2].replace("/etc/redis/tls", str(tmp_path)).replace("--tls", f"-p {server.port} --tls")
            assert subprocess.run([shutil.which("sh"), "-c", script], timeout=30, check=False).returncode == 0
    finally:
        server.kill()
