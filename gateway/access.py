"""Who may call: bearer tokens, in the ways that tools can send them, and the pages that browsers may call from."""

import base64
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.types import Scope

from splitsam.common.auth import Authenticator, Visit
from splitsam.common.errors import Unauthenticated
from splitsam.common.listeners import is_loopback
from splitsam.gateway.errors import GatewayError

_NO_TOKEN = "A token is needed here: ask whoever runs this gateway for one."  # noqa: S105
_BAD_TOKEN = "This token is not known here: ask whoever runs this gateway."  # noqa: S105
_OTHER_PAGE = "This page may not call the gateway: whoever runs it has to list the page's origin in allowed_origins."


class Access:
    """What is checked of every request but those for health and documents.

    Args:
        authenticator: knows the tokens; one that was given none lets everybody in.
        allowed_origins: pages elsewhere that may call.
        is_local: the gateway listens on this machine alone, where no name but localhost leads to it honestly.
    """

    def __init__(self, authenticator: Authenticator, allowed_origins: tuple[str, ...], is_local: bool):
        self._authenticator = authenticator
        self._is_local = is_local
        self._origins = frozenset(origin.rstrip("/").lower() for origin in allowed_origins)

    def check_origin(self, headers: Mapping[str, str]) -> None:
        """Refuse what a browser sends for a page of another site: a token-less gateway on a laptop is reachable to it.

        Raises:
            GatewayError: the page is neither ours nor a listed one.
        """
        origin = headers.get("origin", "").lower()
        if not origin or origin in self._origins:
            return
        place, host = _place(origin)
        if not place or place != headers.get("host", "").lower() or (self._is_local and not is_loopback(host)):
            raise GatewayError(403, "ORIGIN_NOT_ALLOWED", _OTHER_PAGE)

    def admit(self, scope: Scope, token: str | None) -> None:
        """Note whose token it is, as `splitsam.tenant`.

        Raises:
            GatewayError: none was given and one is needed, or it is not known.
        """
        try:
            visit = self._authenticator.visit({"authorization": f"Bearer {token}"} if token else {})
        except Unauthenticated as error:
            raise GatewayError(401, "UNAUTHENTICATED", _BAD_TOKEN if token else _NO_TOKEN) from error
        scope["splitsam.tenant"], scope["splitsam.visit"] = visit.tenant, visit


def check_again(scope: Scope) -> None:
    """Raises GatewayError where the token of a caller who was admitted is revoked by now."""
    visit: Visit = scope["splitsam.visit"]
    try:
        visit.check()
    except Unauthenticated as error:
        raise GatewayError(401, "UNAUTHENTICATED", _BAD_TOKEN) from error


def _place(origin: str) -> tuple[str, str]:
    """host:port and host of an origin; empty for what is none, as the `null` of a page without one."""
    try:
        page = urlsplit(origin)
        return page.netloc, page.hostname or ""
    except ValueError:
        return "", ""


def token_of(headers: Mapping[str, str]) -> str | None:
    """The token in an Authorization header: of Bearer, or the password of Basic, which Label Studio can send."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    match scheme.lower():
        case "bearer":
            return given.strip() or None
        case "basic":
            try:
                return base64.b64decode(given, validate=True).decode().partition(":")[2] or None
            except ValueError:  # neither base64 nor text
                return None
    return None
