"""Authorities and certificates for tests, as files; put in place as Kubernetes puts its Secrets: by swapping a link."""

import datetime
import ipaddress
import os
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from splitsam.common.metrics import Metrics

Days = tuple[float, float]


class Pair:
    """A certificate, its key, and both as PEM."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey):
        self.certificate = certificate
        self.key = key
        self.cert_pem = certificate.public_bytes(serialization.Encoding.PEM)
        plain = serialization.NoEncryption()
        self.key_pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)

    def key_with_passphrase(self) -> bytes:
        locked = serialization.BestAvailableEncryption(b"passphrase")
        return self.key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked)


class Authority(Pair):
    """Signs itself, and what it is asked to."""

    def __init__(self, name: str):
        key = ec.generate_private_key(ec.SECP256R1())
        constraints = (x509.BasicConstraints(ca=True, path_length=0), True)
        super().__init__(_certificate(name, name, key, key, (-1, 2), [constraints]), key)
        self._name = name

    def issue(self, name: str, hosts: tuple[str, ...] = ("localhost", "127.0.0.1"), days: Days = (-1, 1)) -> Pair:
        """A certificate for hosts, valid between these days from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName([_host(host) for host in hosts])
        return Pair(_certificate(name, self._name, key, self.key, days, [(names, False)]), key)


def _certificate(name, issuer, key, signing_key, days, extensions) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(_named(name))
        .issuer_name(_named(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=days[0]))
        .not_valid_after(now + datetime.timedelta(days=days[1]))
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder.sign(signing_key, hashes.SHA256())


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


class SecretVolume:
    """A folder of files that all change at one moment: links into `..data`, itself a link to the current version."""

    def __init__(self, folder: Path, files: dict[str, bytes]):
        self._folder = folder
        self._version = 0
        folder.mkdir()
        self.put(files)
        for name in files:
            (folder / name).symlink_to(Path("..data") / name)

    def put(self, files: dict[str, bytes]) -> None:
        self._version += 1
        version = self._folder / f"..version-{self._version}"
        version.mkdir()
        for name, content in files.items():
            (version / name).write_bytes(content)
        (self._folder / "..data_tmp").symlink_to(version.name)
        os.replace(self._folder / "..data_tmp", self._folder / "..data")

    def __truediv__(self, name: str) -> Path:
        return self._folder / name


def server_files(pair: Pair, client_ca: Pair | None = None) -> dict[str, bytes]:
    """The files of a Secret of type kubernetes.io/tls."""
    files = {"tls.crt": pair.cert_pem, "tls.key": pair.key_pem}
    return files if client_ca is None else files | {"ca.crt": client_ca.cert_pem}


def flags(volume: SecretVolume, *, mutual: bool = False) -> list[str]:
    """Arguments of a service; `mutual` asks for certificates of callers."""
    pair = [
        "--tls-cert-file",
        str(volume / "tls.crt"),
        "--tls-key-file",
        str(volume / "tls.key"),
        "--tls-reload-ms",
        "20",
    ]
    return [*pair, "--tls-client-ca-file", str(volume / "ca.crt")] if mutual else pair


def trust(authority: Pair, own: Pair | None = None) -> grpc.ChannelCredentials:
    """What a caller needs: whom it trusts, and its own pair for mutual TLS."""
    pair = () if own is None else (own.key_pem, own.cert_pem)
    return grpc.ssl_channel_credentials(authority.cert_pem, *pair)


def sample(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(name, labels) or 0.0


def reloads(metrics: Metrics) -> tuple[float, float]:
    """Taken, refused."""
    taken, refused = (
        sample(metrics, "splitsam_certificate_reloads_total", result=result) for result in ("taken", "refused")
    )
    return taken, refused
