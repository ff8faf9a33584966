"""Settings: which source wins, and that a mistake is named before anything starts."""

import json
import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from splitsam.common.keys import EncodingVersion
from splitsam.common.settings import SettingsProblem
from splitsam.decoder_service.settings import DecoderSettings
from splitsam.encoder_service.settings import EncoderSettings

SERVICES = [EncoderSettings, DecoderSettings]
VERSION = EncodingVersion("ab" * 32, "1", "fp32", "fp16")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith("SPLITSAM_"):
            monkeypatch.delenv(name)


@pytest.fixture
def secret(tmp_path: Path) -> str:
    path = tmp_path / "secret"
    path.write_text("0123456789abcdef\n")
    return str(path)


@pytest.mark.parametrize("service", SERVICES)
def test_defaults_apply_when_nothing_is_set(service):
    settings = service.load()
    assert settings.host == "127.0.0.1"
    assert settings.tokens_file is None


def test_the_services_have_ports_of_their_own():
    assert EncoderSettings.load().port != DecoderSettings.load().port


def test_the_environment_wins_over_the_default_and_a_flag_over_both(monkeypatch: pytest.MonkeyPatch):
    default = EncoderSettings.load().max_queue
    monkeypatch.setenv("SPLITSAM_ENCODER_MAX_QUEUE", str(default + 1))
    assert EncoderSettings.load().max_queue == default + 1
    assert EncoderSettings.load(["--max-queue", str(default + 2)]).max_queue == default + 2


def test_one_services_environment_is_not_the_others(monkeypatch: pytest.MonkeyPatch):
    default = DecoderSettings.load().max_queue
    monkeypatch.setenv("SPLITSAM_ENCODER_MAX_QUEUE", str(default + 1))
    assert DecoderSettings.load().max_queue == default


def test_the_arguments_of_the_running_process_are_not_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["pytest", "--port", "1"])
    assert EncoderSettings.load([]).port == EncoderSettings.model_fields["port"].default


@pytest.mark.parametrize("name", ["SPLITSAM_ENCODER_MAX_QEUE", "splitsam_encoder_tyop"])
def test_an_unknown_name_in_the_environment_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setenv(name, "1")
    with pytest.raises(SettingsProblem, match=name):
        EncoderSettings.load()


def test_an_unknown_name_that_breaks_lines_is_refused_in_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SPLITSAM_ENCODER_A\r\nB\x1b[31m", "1")
    with pytest.raises(SettingsProblem) as caught:
        EncoderSettings.load()
    assert str(caught.value) == r"unknown setting in the environment: SPLITSAM_ENCODER_A\r\nB\x1b[31m"


def test_an_unknown_flag_is_refused_by_name(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        EncoderSettings.load(["--max-qeue", "1"])
    assert caught.value.code == 2
    assert "--max-qeue" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("service", "flag", "value"),
    [
        (EncoderSettings, "--port", "65536"),
        (EncoderSettings, "--port", "http"),
        (EncoderSettings, "--stream-window", "0"),
        (EncoderSettings, "--precision", "fp64"),
        (EncoderSettings, "--codec", "int3"),
        (EncoderSettings, "--device", "tpu"),
        (EncoderSettings, "--device", "cuda:x"),
        (EncoderSettings, "--device", "cuda:٣"),  # a digit to Unicode, and not to torch
        (EncoderSettings, "--device", "cuda:03"),
        (DecoderSettings, "--device", "cuda:999999999999"),
        (EncoderSettings, "--batch-sizes", "99999999999"),
        (EncoderSettings, "--model", "vit_x"),
        (EncoderSettings, "--max-wait-ms", "-1"),
        (EncoderSettings, "--redis-timeout-ms", "0"),
        (DecoderSettings, "--cpu-batch-prompts", "0"),
        (DecoderSettings, "--refinement-ttl-s", "0"),
        (DecoderSettings, "--max-reply-bytes", "10"),
    ],
)
def test_a_value_out_of_range_names_its_setting_and_is_shown(service, flag: str, value: str):
    with pytest.raises(SettingsProblem, match=flag.removeprefix("--").replace("-", "_")) as caught:
        service.load([flag, value])
    assert value in str(caught.value)


def test_a_bad_value_in_the_environment_names_its_setting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SPLITSAM_DECODER_FORMAT_THREADS", "many")
    with pytest.raises(SettingsProblem, match="format_threads"):
        DecoderSettings.load()


def test_settings_cannot_be_changed():
    settings = EncoderSettings.load()
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1


@pytest.mark.parametrize("url", ["http://:hunter2@host", "redis://:hunter2@host:port", "hunter2"])
def test_a_url_that_is_not_redis_is_refused_without_showing_it(url: str):
    with pytest.raises(SettingsProblem, match="redis_url") as caught:
        EncoderSettings.load(["--redis-url", url])
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hunter2@host:6379/0",
        "rediss://user:hunter2@host:6379/0?ssl_cert_reqs=none",
        "redis://host:6379/0?password=hunter2",
        "redis://host/0?password=hunter2@home",
        "unix://user:hunter2@/run/redis.sock",
    ],
)
def test_a_redis_password_is_not_logged(url: str):
    logged = EncoderSettings.load(["--redis-url", url]).for_log()
    assert "hunter2" not in json.dumps(logged)
    assert logged["redis_url"].startswith(url.partition("://")[0])


def test_a_redis_url_without_a_password_is_logged_as_it_is():
    url = "redis://host:6379/0"
    assert EncoderSettings.load(["--redis-url", url]).for_log()["redis_url"] == url


@pytest.mark.parametrize("service", SERVICES)
def test_the_file_with_the_redis_url_goes_before_the_url(service, tmp_path: Path):
    path = tmp_path / "url"
    path.write_text("rediss://user:hunter2@host:6379/0?ssl_ca_certs=/ca.crt\n")
    settings = service.load(["--redis-url", "redis://elsewhere", "--redis-url-file", str(path)])
    assert settings.redis_address() == "rediss://user:hunter2@host:6379/0?ssl_ca_certs=/ca.crt"
    assert "hunter2" not in json.dumps(settings.for_log())
    assert service.load(["--redis-url", "redis://elsewhere"]).redis_address() == "redis://elsewhere"


@pytest.mark.parametrize("content", [None, b"", b"REPLACE_URL", b"http://:hunter2@host", b"\xffhunter2"])
def test_a_file_without_a_redis_url_is_refused_without_showing_it(tmp_path: Path, content: bytes | None):
    path = tmp_path / "url"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsProblem, match="redis_url_file") as caught:
        EncoderSettings.load(["--redis-url-file", str(path)]).redis_address()
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("flag", ["--tokens-file", "--previous-secret-file"])
def test_tenants_and_rotation_need_a_secret(flag: str, secret: str):
    with pytest.raises(SettingsProblem, match="needs secret_file") as caught:
        EncoderSettings.load([flag, secret, "--redis-url", "redis://:hunter2@host"])
    assert "hunter2" not in str(caught.value)
    EncoderSettings.load([flag, secret, "--secret-file", secret])


def test_the_secret_file_decides_the_keys_and_surrounding_space_does_not(secret: str, tmp_path: Path):
    (tmp_path / "spaced").write_text("\n0123456789abcdef  \n\n")
    rings = [EncoderSettings.load(["--secret-file", path]).key_ring() for path in (secret, str(tmp_path / "spaced"))]
    rings.append(EncoderSettings.load().key_ring())
    keys = [ring.embedding_addresses("acme", bytes(32), VERSION)[0].key for ring in rings]
    assert keys[0] == keys[1] != keys[2]


def test_the_previous_secret_is_accepted_after_the_current_one(secret: str, tmp_path: Path):
    (tmp_path / "old").write_text("fedcba9876543210")
    arguments = ["--secret-file", secret, "--previous-secret-file", str(tmp_path / "old")]
    rotating = EncoderSettings.load(arguments).key_ring().embedding_addresses("acme", bytes(32), VERSION)
    current = EncoderSettings.load(["--secret-file", secret]).key_ring()
    old = EncoderSettings.load(["--secret-file", str(tmp_path / "old")]).key_ring()
    expected = [ring.embedding_addresses("acme", bytes(32), VERSION)[0] for ring in (current, old)]
    assert rotating == expected


def test_both_services_agree_on_keys_without_a_secret():
    rings = [service.load().key_ring() for service in SERVICES]
    assert rings[0].addresses("default", bytes(32)) == rings[1].addresses("default", bytes(32))


@pytest.mark.parametrize("content", [None, "", "too short"])
def test_a_missing_or_short_secret_is_refused(tmp_path: Path, content: str | None):
    path = tmp_path / "secret"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SettingsProblem, match="secret_file"):
        EncoderSettings.load(["--secret-file", str(path)]).key_ring()
