"""Certificates: which are refused at start, and what is taken up when their files change."""

import logging

import pytest
from certificates import Pair, SecretVolume, flags, reloads, sample, server_files
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from splitsam.common.certificates import ServerCertificate
from splitsam.common.metrics import Metrics
from splitsam.common.settings import SettingsProblem
from splitsam.encoder_service.settings import EncoderSettings


def certificate(volume: SecretVolume, metrics: Metrics, *, mutual: bool = False) -> ServerCertificate:
    made = ServerCertificate.of(EncoderSettings.load(flags(volume, mutual=mutual)), metrics)
    assert made is not None
    return made


def ed25519_key(_pair: Pair) -> bytes:
    return ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


BAD = {
    "no certificate": lambda authority, good: {"tls.crt": b"nonsense", "tls.key": good.key_pem},
    "empty certificate": lambda authority, good: {"tls.crt": b"", "tls.key": good.key_pem},
    "no key": lambda authority, good: {"tls.crt": good.cert_pem, "tls.key": b"nonsense"},
    "a key with a passphrase": lambda authority, good: {
        "tls.crt": good.cert_pem,
        "tls.key": good.key_with_passphrase(),
    },
    "a key that gRPC does not show": lambda authority, good: {"tls.crt": good.cert_pem, "tls.key": ed25519_key(good)},
    "the key of another": lambda authority, good: {"tls.crt": good.cert_pem, "tls.key": authority.key_pem},
    "an expired certificate": lambda authority, good: server_files(authority.issue("old", days=(-2, -0.1))),
    "a certificate of tomorrow": lambda authority, good: server_files(authority.issue("early", days=(0.5, 2))),
    "no client CA": lambda authority, good: server_files(good) | {"ca.crt": b"nonsense"},
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_certificate_is_refused_at_start(bad, authority, server_pair, tmp_path, metrics):
    volume = SecretVolume(tmp_path / "tls", {"ca.crt": authority.cert_pem} | BAD[bad](authority, server_pair))
    with pytest.raises(SettingsProblem, match=r"^tls_cert_file: ") as caught:
        certificate(volume, metrics, mutual=True)
    assert "PRIVATE" not in str(caught.value)


def test_a_missing_file_is_named_at_start(volume, metrics):
    (volume / "tls.key").unlink()
    with pytest.raises(SettingsProblem, match=r"tls\.key"):
        certificate(volume, metrics)


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_new_certificate_is_counted_once_and_the_old_one_stays(
    bad, authority, server_pair, volume, metrics, caplog: pytest.LogCaptureFixture
):
    kept = certificate(volume, metrics, mutual=True)
    expiry = sample(metrics, "splitsam_certificate_expiry_seconds")
    assert expiry == server_pair.certificate.not_valid_after_utc.timestamp()
    volume.put({"ca.crt": authority.cert_pem} | BAD[bad](authority, authority.issue("next")))
    for _ in range(4):
        kept.look()
    assert reloads(metrics) == (0, 1)
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "old one stays" in record.message
    assert "PRIVATE" not in record.problem
    assert sample(metrics, "splitsam_certificate_expiry_seconds") == expiry
    assert kept._next() is None
    volume.put(server_files(authority.issue("good", days=(-1, 1.5)), authority))
    for _ in range(3):
        kept.look()
    assert reloads(metrics) == (1, 1)
    assert sample(metrics, "splitsam_certificate_expiry_seconds") > expiry


def test_files_that_vanish_and_come_back_change_nothing(authority, server_pair, volume, metrics):
    kept = certificate(volume, metrics)
    volume.put({})
    for _ in range(3):
        kept.look()
    assert reloads(metrics) == (0, 1)
    volume.put(server_files(server_pair, authority))
    for _ in range(3):
        kept.look()
    assert reloads(metrics) == (0, 1)


def test_a_pair_replaced_file_by_file_is_never_judged_in_between(authority, tmp_path, metrics):
    first, second = authority.issue("first"), authority.issue("second")
    for name, content in server_files(first).items():
        (tmp_path / name).write_bytes(content)
    kept = certificate(tmp_path, metrics)
    (tmp_path / "tls.crt").write_bytes(second.cert_pem)
    kept.look()
    (tmp_path / "tls.key").write_bytes(second.key_pem)
    kept.look()
    kept.look()
    assert reloads(metrics) == (1, 0)


def test_half_a_pair_and_a_client_ca_without_tls_are_refused(volume):
    pair = flags(volume)
    for arguments, named in ((pair[:2], "need each other"), (pair[2:4], "need each other")):
        with pytest.raises(SettingsProblem, match=named):
            EncoderSettings.load(arguments)
    with pytest.raises(SettingsProblem, match="needs tls_cert_file"):
        EncoderSettings.load(["--tls-client-ca-file", str(volume / "ca.crt")])
