"""The certificate of a service: checked before it is used, read again when its files change; connections stay open."""

import collections
import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from splitsam.common.changing_files import BadContent, ChangingFiles
from splitsam.common.metrics import ProcessMetrics
from splitsam.common.settings import ProcessSettings, SettingsProblem

log = logging.getLogger("splitsam.certificates")


@dataclass(frozen=True, repr=False)
class Identity:
    """What a server shows its callers, all PEM.

    Args:
        chain: its certificate, then those between it and the authority.
        key: of the certificate, without a passphrase.
        client_ca: authorities of which callers must have a certificate; None asks for none.
    """

    chain: bytes
    key: bytes
    client_ca: bytes | None

    def check(self) -> datetime:
        """Until when the certificate is valid.

        Raises:
            BadContent: a part cannot be read, or is not valid now, or certificate and key are no pair.
        """
        certificate = _certificates(self.chain, "certificate")[0]
        try:
            key = load_pem_private_key(self.key, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise BadContent("the key is not a PEM file without a passphrase") from error
        if not isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
            raise BadContent("the key is neither RSA nor EC: gRPC shows no other")
        if certificate.public_key() != key.public_key():
            raise BadContent("the key is not the certificate's")
        if self.client_ca is not None:
            _certificates(self.client_ca, "client CA")
        now, until = datetime.now(UTC), certificate.not_valid_after_utc
        if not certificate.not_valid_before_utc <= now < until:
            raise BadContent(f"the certificate is valid from {certificate.not_valid_before_utc} to {until}")
        return until

    def for_grpc(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(self.key, self.chain)], self.client_ca)


def _certificates(pem: bytes, what: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BadContent(f"the {what} is not a PEM file of certificates") from error


class ServerCertificate:
    """The identity in use and the files it came from.

    Raises:
        SettingsProblem: the files are missing or bad; only later, when there is one to keep, bad ones are refused.
    """

    def __init__(self, chain: Path, key: Path, client_ca: Path | None, metrics: ProcessMetrics):
        self._paths = (chain, key, client_ca)
        self._metrics = metrics
        try:
            self._used = self._read()
            until = self._used.check()
        except (OSError, BadContent) as error:
            raise SettingsProblem(f"tls_cert_file: {error}") from error
        self._metrics.certificate_expiry.set(until.timestamp())
        # Filled by `look`, emptied by the handshakes on gRPC's threads.
        self._fresh: collections.deque[grpc.ServerCertificateConfiguration] = collections.deque(maxlen=1)
        self._files = ChangingFiles(self._used, self._read, self._take, metrics.certificate_reloads, log, "certificate")

    @classmethod
    def of(cls, settings: ProcessSettings, metrics: ProcessMetrics) -> "ServerCertificate | None":
        """What the settings name; None for no TLS."""
        if settings.tls_cert_file is None or settings.tls_key_file is None:
            return None
        return cls(settings.tls_cert_file, settings.tls_key_file, settings.tls_client_ca_file, metrics)

    @property
    def identity(self) -> Identity:
        """What is in use; another object when it was replaced."""
        return self._used

    def credentials(self) -> grpc.ServerCredentials:
        """For one server; with a client CA, callers need a certificate of it."""
        return grpc.dynamic_ssl_server_credentials(
            self._used.for_grpc(), self._next, require_client_authentication=self._used.client_ca is not None
        )

    def look(self) -> None:
        """Take up what the files hold if it is new and good."""
        self._files.look()

    async def watch(self, interval_s: float) -> None:
        """Look again and again, until cancelled."""
        await self._files.watch(interval_s)

    def _take(self, seen: Identity) -> None:
        until = seen.check()
        self._used = seen
        self._fresh.append(seen.for_grpc())
        self._metrics.certificate_expiry.set(until.timestamp())
        log.info("a new certificate is in use", extra={"valid_until": until.isoformat()})

    def _read(self) -> Identity:
        chain, key, client_ca = self._paths
        return Identity(chain.read_bytes(), key.read_bytes(), None if client_ca is None else client_ca.read_bytes())

    def _next(self) -> grpc.ServerCertificateConfiguration | None:
        """Asked by gRPC before each handshake; None for no change."""
        try:
            return self._fresh.popleft()
        except IndexError:
            return None
