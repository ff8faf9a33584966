"""Bearer tokens: who a caller is. Without a tokens file everybody is the tenant `default`."""

import hmac
from collections.abc import Mapping
from pathlib import Path

from splitsam.common.errors import Unauthenticated
from splitsam.common.settings import SettingsProblem, read_words

DEFAULT_TENANT = "default"


class Authenticator:
    """Maps the `authorization` metadata of a call to a tenant.

    Args:
        tenants_by_token: None switches authentication off.
    """

    def __init__(self, tenants_by_token: Mapping[str, str] | None = None):
        self._tenants = None if tenants_by_token is None else dict(tenants_by_token)

    @classmethod
    def from_file(cls, path: Path | None) -> "Authenticator":
        """Read lines of `tenant token`; blank lines and lines that begin with # are skipped.

        Raises:
            SettingsProblem: the file is missing, has no token, or a line is not of that form.
        """
        if path is None:
            return cls()
        tenants: dict[str, str] = {}
        for number, words in read_words("tokens_file", path):
            if len(words) != 2 or len(words[1]) < 16 or words[1] in tenants:
                raise SettingsProblem(
                    f"tokens_file: line {number} is not 'tenant token' with a new token of 16 or more"
                )
            tenants[words[1]] = words[0]
        if not tenants:
            raise SettingsProblem("tokens_file: holds no token")
        return cls(tenants)

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
