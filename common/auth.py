"""Bearer tokens: who a caller is. Without a tokens file everybody is the tenant `default`."""

import hmac
import logging
from collections.abc import Mapping
from pathlib import Path

from splitsam.common.changing_files import BadContent, ChangingFiles
from splitsam.common.errors import Unauthenticated
from splitsam.common.metrics import ProcessMetrics
from splitsam.common.settings import SettingsProblem, words_of

DEFAULT_TENANT = "default"
log = logging.getLogger("splitsam.tokens")


class Authenticator:
    """Maps the `authorization` metadata of a call to a tenant, by a file that may change meanwhile.

    Args:
        path: of lines `tenant token`; blank lines and those that begin with # are skipped. None switches
            authentication off.

    Raises:
        SettingsProblem: the file is missing, has no token, or a line is not of that form.
    """

    def __init__(self, path: Path | None, metrics: ProcessMetrics):
        self._tenants: Mapping[str, str] | None = None
        self._file: ChangingFiles[bytes] | None = None
        if path is None:
            return
        try:
            content = path.read_bytes()
            self._tenants = _parse(content)
        except (OSError, BadContent) as error:
            raise SettingsProblem(f"tokens_file: {error}") from error
        self._file = ChangingFiles(content, path.read_bytes, self._take, metrics.token_reloads, log, "file of tokens")

    def tenant(self, metadata: Mapping[str, str | bytes]) -> str:
        """The caller's tenant.

        Raises:
            Unauthenticated: no bearer token, or one that is not known.
        """
        if self._tenants is None:
            return DEFAULT_TENANT
        scheme, _, given = str(metadata.get("authorization", "")).partition(" ")
        if scheme.lower() != "bearer" or not given:
            raise Unauthenticated("authorization: a bearer token is required")
        found = None
        for token, tenant in self._tenants.items():  # every token is compared: time says nothing of the match
            if hmac.compare_digest(token.encode(), given.encode()):
                found = tenant
        if found is None:
            raise Unauthenticated("authorization: the token is not known")
        return found

    def visit(self, metadata: Mapping[str, str | bytes]) -> "Visit":
        """As `tenant`, for a caller who may stay on."""
        return Visit(self, metadata)

    async def watch(self, interval_s: float) -> None:
        """Take up what the file comes to hold, until cancelled; a bad one does not replace a good one."""
        if self._file is not None:
            await self._file.watch(interval_s)

    def _take(self, content: bytes) -> None:
        self._tenants = _parse(content)
        log.info("new tokens are in use", extra={"tokens": len(self._tenants)})


class Visit:
    """A caller who was let in, on a stream that may outlive its token.

    Raises:
        Unauthenticated: as `Authenticator.tenant`.
    """

    def __init__(self, authenticator: Authenticator, metadata: Mapping[str, str | bytes]):
        self._authenticator = authenticator
        self._metadata = metadata
        self._checked = authenticator._tenants
        self.tenant = authenticator.tenant(metadata)

    def check(self) -> None:
        """Raises Unauthenticated where the token is not the tenant's any more; free of cost while no token changes."""
        known = self._authenticator._tenants
        if known is self._checked:
            return
        if self._authenticator.tenant(self._metadata) != self.tenant:
            raise Unauthenticated("authorization: the token is another tenant's now")
        self._checked = known


def _parse(content: bytes) -> dict[str, str]:
    """Tenants by token; raises BadContent."""
    tenants: dict[str, str] = {}
    try:
        lines = words_of(content)
    except UnicodeDecodeError:  # its text would show what was read
        raise BadContent("not a text file") from None
    for number, words in lines:
        if len(words) != 2 or len(words[1]) < 16 or words[1] in tenants:
            raise BadContent(f"line {number} is not 'tenant token' with a new token of 16 or more")
        tenants[words[1]] = words[0]
    if not tenants:
        raise BadContent("holds no token")
    return tenants
