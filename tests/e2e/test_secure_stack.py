"""A deployment as deploy/ describes it: mutual TLS, tokens, Redis as its limited user, over TLS where that can be had.

Its secrets are those that deploy/make-secrets writes. What a client does with it leaves nothing private in any log.
"""

import base64
import subprocess
from pathlib import Path

import grpc
import pytest
import redis
import yaml
from certificates import SecretVolume, server_files
from e2e_support import draw, image_file, is_serving, run_command, wait_until
from gateway_support import running_gateway
from redis_process import RedisProcess, redis_server_with_tls

from splitsam.client import TLS, AsyncClient, Client, SplitsamError
from splitsam.client.processes import LOOPBACK
from splitsam.client.stack import Stack, StackSettings

pytestmark = pytest.mark.own_services

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, str]:
    """The contents of all Secrets, for the tenant alice."""
    path = tmp_path_factory.mktemp("made") / "secrets.yaml"
    with path.open("w") as file:
        subprocess.run([DEPLOY / "make-secrets", "alice"], stdout=file, check=True, timeout=30)
    values = {}
    for secret in yaml.safe_load_all(path.read_text()):
        values |= secret["stringData"]
    return values


@pytest.fixture(scope="module")
def files(tmp_path_factory, authority, other_authority, caller_pair) -> Path:
    """A caller's files, and Redis'."""
    folder = tmp_path_factory.mktemp("files")
    redis_pair = authority.issue("redis")
    contents = {
        "ca.pem": authority.cert_pem,
        "other-ca.pem": other_authority.cert_pem,
        "caller.pem": caller_pair.cert_pem,
        "caller.key": caller_pair.key_pem,
        "redis.pem": redis_pair.cert_pem,
        "redis.key": redis_pair.key_pem,
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module", params=["plain", "TLS"])
def limited_redis(request, tmp_path_factory, made, files):
    """A Redis with the users of the Secret, and the URL that the services have for it."""
    folder = tmp_path_factory.mktemp("redis")
    acl = folder / "users.acl"
    acl.write_text(f"{made['users.acl']}user watcher on nopass ~* &* +@all\n")
    query, scheme, program, tls = "", "redis", None, None
    if request.param == "TLS":
        program = redis_server_with_tls()
        if program is None:
            pytest.skip("no redis-server with TLS: the embedded one has none, Debian's package redis-server has")
        tls = (files / "redis.pem", files / "redis.key", files / "ca.pem")
        named = {"ssl_ca_certs": "ca.pem", "ssl_certfile": "caller.pem", "ssl_keyfile": "caller.key"}
        query = "?" + "&".join(f"{name}={files / file}" for name, file in named.items())
        scheme = "rediss"
    server = RedisProcess(folder, ["--aclfile", str(acl)], tls=tls, program=program)
    url = made["url"].replace("redis://", f"{scheme}://").replace("splitsam-redis:6379", f"127.0.0.1:{server.port}")
    yield server, url + query, f"{scheme}://watcher:any@127.0.0.1:{server.port}/0{query}"
    server.kill()


@pytest.fixture(scope="module")
def volume(tmp_path_factory, authority) -> SecretVolume:
    return SecretVolume(tmp_path_factory.mktemp("volume") / "tls", server_files(authority.issue("services"), authority))


@pytest.fixture(scope="module")
def secure(limited_redis, volume, files, made, weights, device_args, tmp_path_factory):
    folder = tmp_path_factory.mktemp("secure")
    (folder / "secret").write_text(made["secret"])
    (folder / "tokens").write_text(made["tokens"])
    arguments = ("--checkpoint", str(weights), *device_args, "--tokens-file", str(folder / "tokens"))
    arguments += ("--log-level", "debug", "--tls-reload-ms", "50", "--redis-timeout-ms", "10000")
    settings = StackSettings(
        encoder_args=arguments,
        decoder_args=(*arguments, "--encoder-ca-file", str(files / "ca.pem")),
        redis_url=limited_redis[1],
        run_folder=folder,
        tls_cert_file=volume / "tls.crt",
        tls_key_file=volume / "tls.key",
        tls_client_ca_file=volume / "ca.crt",
        stop_timeout_s=30.0,
    )
    with Stack(settings.on_free_ports()) as stack:
        yield stack


@pytest.fixture(scope="module")
def token(made) -> str:
    return made["tokens"].split()[1]


@pytest.fixture(scope="module")
def tls(files) -> TLS:
    return TLS(files / "ca.pem", files / "caller.pem", files / "caller.key")


def test_the_client_encodes_and_clicks(secure, token, tls, photo):
    with Client(secure.encoder, secure.decoder, token=token, tls=tls) as client:
        image = client.encode(photo)
        first = client.predict(image, points=[(100, 120)], refinement_tokens=True)[0]
        again = client.predict(image, points=[(100, 120)], mask_input=first)[0]
        assert first.to_array().shape == again.to_array().shape == (240, 320)
        assert list(
            client.generate(image, points_per_side=2, predicted_iou_threshold=0.0, stability_score_threshold=0.0)
        )


def test_the_examples_click_with_a_certificate_that_is_trusted(secure, token, files, photo, example, tmp_path):
    (tmp_path / "token").write_text(token)
    (tmp_path / "photo.png").write_bytes(photo)
    pair = "--cert", files / "caller.pem", "--key", files / "caller.key", "--token-file", tmp_path / "token"
    where = "--encoder", secure.encoder, "--decoder", secure.decoder, *pair
    for ca, status in (("ca.pem", 0), ("other-ca.pem", 1)):
        result = example.run("click", "--click", "100,120", "--ca", files / ca, *where, tmp_path / "photo.png")
        assert result.returncode == status, result.stderr
    assert "certificate" in result.stderr


def test_the_gateway_calls_the_services_with_its_own_certificate(secure, token, files, photo, tmp_path):
    (tmp_path / "token").write_text(token)
    pair = ("--service-cert-file", str(files / "caller.pem"), "--service-key-file", str(files / "caller.key"))
    trust = ("--service-ca-file", str(files / "ca.pem"), "--service-token-file", str(tmp_path / "token"))
    with running_gateway(secure.encoder, secure.decoder, tmp_path, *trust, *pair) as gateway:
        opened = gateway.call("/v1/images", photo).json
        answer = gateway.call("/v1/masks", {"key": opened["key"], "points": [[100, 120]]})
        assert answer.status == 200
        assert token not in gateway.child.log_path.read_text()


def test_the_decoder_calls_the_encoder_with_its_own_certificate(secure, token, tls):
    with Client(secure.encoder, secure.decoder, token=token, tls=tls) as client:
        image = client.encode(image_file(draw(73)))
        grids = {"point_grid": [(0.5, 0.5)], "crop_point_grids": [[(0.5, 0.5)]]}
        everything = {"predicted_iou_threshold": 0.0, "stability_score_threshold": 0.0}
        assert list(client.generate(image, crop_layers=1, **grids, **everything))
    assert secure.children["encoder"].log_path.read_text().count("method=LookUpEmbedding") >= 5


async def test_the_asyncio_client_encodes_and_clicks(secure, token, tls):
    async with AsyncClient(secure.encoder, secure.decoder, token=token, tls=tls) as client:
        image = await client.encode(image_file(draw(71)))
        assert (await client.predict(image, points=[(100, 120)]))[0].to_array().shape == (240, 320)


def test_the_command_line_segments(secure, token, files, photo, tmp_path):
    (tmp_path / "photo.png").write_bytes(photo)
    (tmp_path / "token").write_text(token)
    where = ("--encoder", secure.encoder, "--decoder", secure.decoder, "--token-file", tmp_path / "token")
    pair = ("--ca", files / "ca.pem", "--cert", files / "caller.pem", "--key", files / "caller.key")
    result = run_command("segment", "photo.png", "--point", "100,120", *where, *pair, folder=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    for options in ((), ("--tls",), pair[:2], ("--key", files / "caller.key"), (*pair, "--server-name", "elsewhere")):
        refused = run_command("segment", "photo.png", "--point", "100,120", *where, *options, folder=tmp_path)
        assert refused.returncode == 1
        assert refused.stderr.splitlines()[-1].startswith("splitsam: ")  # before it, gRPC may say of the handshake
        assert token not in refused.stderr


def test_a_tunnel_names_the_server_it_leads_to(secure, token, files, volume, authority):
    elsewhere = authority.issue("services", hosts=("encoder.example",))
    before = {name: (volume / name).read_bytes() for name in ("tls.crt", "tls.key", "ca.crt")}
    pair = (files / "ca.pem", files / "caller.pem", files / "caller.key")

    def answers(server_name: str | None) -> bool:
        with Client(secure.encoder, secure.decoder, token=token, tls=TLS(*pair, server_name)) as client:
            try:
                client.info()
            except SplitsamError:
                return False
            return True

    assert answers(None)
    volume.put(server_files(elsewhere, authority))
    wait_until(lambda: answers("encoder.example"), "both services show the new certificate")
    assert not answers(None)
    volume.put(before)
    wait_until(lambda: answers(None), "both services show the old one again")


def test_plaintext_is_answered_on_the_health_port_only(secure):
    for name in ("encoder", "decoder"):
        health, calls = (getattr(secure.settings, f"{name}_{kind}") for kind in ("health_port", "port"))
        assert is_serving(f"{LOOPBACK}:{health}")
        assert not is_serving(f"{LOOPBACK}:{calls}")


def test_redis_refused_none_of_it(secure, limited_redis, token, tls, photo):
    with Client(secure.encoder, secure.decoder, token=token, tls=tls) as client:
        client.encode(photo)
        assert client.encode(photo).cache_hit  # so Redis stored and gave it
    with redis.Redis.from_url(limited_redis[2]) as watcher:
        refused = {entry["object"] for entry in watcher.acl_log() if entry["username"] == "splitsam"}
        names = [name.decode() for name in watcher.keys("*")]
    assert all(name.startswith(("client|", "hello", "client")) for name in refused)  # redis-py introduces itself
    assert names
    assert all(name.startswith("splitsam:") for name in names)


def test_redis_refuses_its_limited_user_everything_else(secure, limited_redis):
    with redis.Redis.from_url(limited_redis[1]) as client:
        assert client.ping()
        for name in ("GET", "GETEX", "STRLEN", "DEL"):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(name, "another:key")
        commands = ("KEYS *", "SCAN 0", "FLUSHALL", "CONFIG GET *", "CLIENT LIST", "ACL LIST", "EVAL return 0")
        for command in (*commands, "SELECT 1", "SUBSCRIBE x", "PUBLISH x y", "RENAME splitsam:a splitsam:b", "MONITOR"):
            with pytest.raises(redis.exceptions.ResponseError, match=r"(?i)noperm|permission"):
                client.execute_command(*command.split())


def test_redis_over_tls_is_verified(limited_redis, files):
    _, url, _ = limited_redis
    if not url.startswith("rediss"):
        pytest.skip("this Redis speaks no TLS")
    wrong = {
        "another authority": url.replace(str(files / "ca.pem"), str(files / "other-ca.pem")),
        "no certificate of the caller": url.partition("&")[0],
        "plaintext": url.replace("rediss://", "redis://").partition("?")[0],
        "another host": url.replace("127.0.0.1", "127.0.0.2"),
    }
    for why, bad in wrong.items():
        with redis.Redis.from_url(bad) as client, pytest.raises((redis.ConnectionError, redis.TimeoutError)):
            pytest.fail(f"{why}: {client.ping()}")
    with redis.Redis.from_url(url) as client:
        assert client.ping()


def test_no_log_holds_anything_private(secure, limited_redis, made, token, tls):
    """At level debug, after calls that succeed, are refused and are damaged."""
    picture = image_file(draw(72), "PNG")
    with Client(secure.encoder, secure.decoder, token=token, tls=tls) as client:
        image = client.encode(picture)
        mask = client.predict(image, points=[(100, 120)], refinement_tokens=True)[0]
        with pytest.raises(SplitsamError):
            client.encode(picture[:200])
        with pytest.raises(SplitsamError):
            client.predict("0" * 64, points=[(1, 1)])
    stranger_token = "a-token-that-nobody-knows"
    with Client(secure.encoder, secure.decoder, token=stranger_token, tls=tls) as stranger:
        with pytest.raises(SplitsamError) as caught:
            stranger.encode(picture)
        assert caught.value.code == grpc.StatusCode.UNAUTHENTICATED
    logs = "".join(secure.children[name].log_path.read_text() for name in ("encoder", "decoder"))
    assert logs.count("EncodeImage") >= 2  # both are written to
    assert logs.count("PredictMasks") >= 2
    password = made["url"].partition("splitsam:")[2].partition("@")[0]
    private = [token, stranger_token, made["secret"].strip(), password, "PRIVATE KEY", mask.refinement_token]
    body = picture[100:148]
    private += [base64.b64encode(body[:45]).decode(), body.hex(), repr(body)[2:40], repr(picture[:16])[2:-1]]
    for text in private:
        assert text
        assert str(text) not in logs


def test_secrets_are_on_no_command_line_and_in_no_environment(secure, made, token):
    password = made["url"].partition("splitsam:")[2].partition("@")[0]
    for name in ("encoder", "decoder"):
        process = Path(f"/proc/{secure.children[name].pid}")
        seen = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        assert b"--redis-url-file" in seen
        for secret in (password, token, made["secret"].strip()):
            assert secret.encode() not in seen
