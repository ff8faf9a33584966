"""TLS of the gateway: the certificate is read again when its files change, and open connections stay."""

import asyncio
import logging
import ssl

from splitsam.common.certificates import Identity, ServerCertificate
from splitsam.common.settings import ProcessSettings

log = logging.getLogger("splitsam.gateway.tls")


class ServerTls:
    """A context for handshakes with what the files hold; a bad new certificate does not replace a good one.

    Args:
        certificate: watches the files and judges them.
        settings: name them.
    """

    def __init__(self, certificate: ServerCertificate, settings: ProcessSettings):
        self._certificate = certificate
        self._settings = settings
        self._loaded: Identity | None = None
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._load()
        if settings.tls_client_ca_file is not None:
            self.context.load_verify_locations(settings.tls_client_ca_file)
            self.context.verify_mode = ssl.CERT_REQUIRED

    async def watch(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await asyncio.sleep(self._settings.tls_reload_ms / 1000)
            await asyncio.to_thread(self._certificate.look)
            if self._certificate.identity is not self._loaded:
                try:
                    self._load()
                except (OSError, ssl.SSLError) as error:  # the files have changed again; the next look sees it
                    log.warning("a new certificate could not be loaded", extra={"problem": str(error)})

    def _load(self) -> None:
        """From the files, since OpenSSL takes no bytes: the handshake of a file that was judged a moment ago."""
        settings, identity = self._settings, self._certificate.identity
        if settings.tls_cert_file is not None:
            self.context.load_cert_chain(settings.tls_cert_file, settings.tls_key_file)
        self._loaded = identity
