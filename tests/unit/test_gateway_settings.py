"""Settings of the gateway: defaults that are safe, and mistakes named before anything starts."""

import os

import pytest

from splitsam.client.connection import DEFAULT_DECODER, DEFAULT_ENCODER
from splitsam.gateway.__main__ import main
from splitsam.gateway.settings import GatewaySettings


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in os.environ:
        if name.upper().startswith("SPLITSAM_"):
            monkeypatch.delenv(name)


def test_defaults_call_and_answer_this_machine_alone_and_fetch_from_nowhere():
    settings = GatewaySettings.load()
    assert (settings.host, settings.tokens_file) == ("127.0.0.1", None)
    assert (settings.encoders, settings.decoders) == ((DEFAULT_ENCODER,), (DEFAULT_DECODER,))
    assert (settings.image_hosts, settings.private_images, settings.allowed_origins) == ((), False, ())


def test_lists_are_separated_by_commas_in_variables_and_flags(monkeypatch):
    monkeypatch.setenv("SPLITSAM_GATEWAY_IMAGE_HOSTS", "a.example,*.b.example")
    settings = GatewaySettings.load(["--encoders", "one:1,two:2"])
    assert settings.image_hosts == ("a.example", "*.b.example")
    assert settings.encoders == ("one:1", "two:2")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--port", "70000"), "port"),
        (("--encoders", ""), "encoders"),
        (("--service-cert-file", "x.pem"), "need each other"),
        (("--service-token-file", "no-such-file"), "service_token_file"),
        (("--fetch-ca-file", "no-such-file"), "fetch_ca_file"),
        (("--tls-cert-file", "no.pem", "--tls-key-file", "no.key"), "tls_cert_file"),
        (("--label-studio-url", "label-studio:8080"), "label_studio_url"),
        (("--caller-requests-per-s", "5"), "need tokens_file"),
        (("--caller-requests-in-flight", "5"), "need tokens_file"),
        (("--quotas-file", "no-such-file"), "need tokens_file"),
        (("--host", "203.0.113.7"), "port: cannot listen"),
    ],
)
def test_bad_setting_is_named_in_one_line(arguments, said, capsys):
    assert main([*arguments, "--log-level", "error"]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said in line


def test_secret_files_hold_one_word_that_is_not_shown(tmp_path, capsys):
    for content in ("", "first second"):
        (tmp_path / "token").write_text(content)
        assert main(["--label-studio-token-file", str(tmp_path / "token"), "--log-level", "error"]) == 2
        said = capsys.readouterr().err
        assert "label_studio_token_file" in said
        assert "second" not in said


def test_quotas_file_that_is_bad_is_named(tmp_path, capsys):
    (tmp_path / "tokens").write_text("script script-token-0123456789\n")
    (tmp_path / "quotas").write_text("script many\n")
    flags = ["--tokens-file", str(tmp_path / "tokens"), "--quotas-file", str(tmp_path / "quotas")]
    assert main([*flags, "--log-level", "error"]) == 2
    assert "quotas_file: line 1" in capsys.readouterr().err
