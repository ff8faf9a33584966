"""Who may call, and how much: bearer tokens, in the ways that tools can send them, the share of each caller, and the
pages that browsers may call from."""

import base64
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from starlette.routing import BaseRoute, Match
from starlette.types import Scope

from splitsam.common.auth import Authenticator, Visit
from splitsam.common.errors import QuotaExceeded, Unauthenticated
from splitsam.common.listeners import is_loopback
from splitsam.common.quotas import Quotas
from splitsam.gateway.errors import GatewayError
from splitsam.gateway.metrics import GatewayMetrics

_NO_TOKEN = "A token is needed here: ask whoever runs this gateway for one."  # noqa: S105
_BAD_TOKEN = "This token is not known here: ask whoever runs this gateway."  # noqa: S105
_TOO_MUCH = "More was asked for with this token than one caller may at a time; try again in a moment."
_OTHER_PAGE = "This page may not call the gateway: whoever runs it has to list the page's origin in allowed_origins."


class Access:
    """What is checked of every request but those for health and documents.

    Args:
        authenticator: knows the tokens; one that was given none lets everybody in.
        allowed_origins: pages elsewhere that may call.
        is_local: the gateway listens on this machine alone, where no name but localhost leads to it honestly.
        quotas: the shares of callers, by the names of their tokens.
        routes: all that there are, by which refusals are counted.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        allowed_origins: tuple[str, ...],
        is_local: bool,
        quotas: Quotas,
        routes: Sequence[BaseRoute],
        metrics: GatewayMetrics,
    ):
        self._authenticator = authenticator
        self._quotas = quotas
        self._routes = routes
        self._metrics = metrics
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

    def take_share(self, scope: Scope) -> None:
        """Count the request of a caller who was admitted as one of its own until `splitsam.held` is closed.

        Raises:
            GatewayError: the caller has used up its share; says when there will be more.
        """
        try:
            scope["splitsam.held"].enter_context(self._quotas.admitted(scope["splitsam.tenant"]))
        except QuotaExceeded as error:
            self._metrics.refusals.labels(self._note_route(scope)).inc()
            raise GatewayError(429, error.reason, _TOO_MUCH, retry_after_s=error.retry_delay_s) from error

    def _note_route(self, scope: Scope) -> str:
        """The path of the route that a request is for, ahead of the router where that comes later."""
        if "route" not in scope:
            scope["route"] = next((each for each in self._routes if each.matches(scope)[0] is Match.FULL), None)
        return getattr(scope["route"], "path", "unknown")


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
