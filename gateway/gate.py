"""ASGI middleware that lets in who may come in; what it refuses never reaches a route."""

import contextlib
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from splitsam.gateway.access import Access, token_of
from splitsam.gateway.error_forms import error_response
from splitsam.gateway.errors import GatewayError

# Nothing of a caller is to be had there.
OPEN = ("/", "/docs", "/openapi.json", "/health", "/livez", "/readyz")
OPEN_FOLDERS = ("/assets/",)
# What comes there may have its token inside a message; the route admits it when `splitsam.tenant` is None.
_TOKEN_INSIDE = ("/v1/pointer", "/sam2/")


class Gate:
    """Checks the page that a browser calls from, the token, in a header or as the query's `api_key`, and its caller's
    share, which is held until the request ends. A pointer is counted by its route, which can say why it is refused."""

    def __init__(self, app: ASGIApp, access: Access):
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        with contextlib.ExitStack() as held:
            scope["splitsam.held"] = held
            try:
                self._let_in(scope)
            except GatewayError as error:
                await _refuse(scope, receive, send, error)
                return
            await self._app(scope, receive, send)

    def _let_in(self, scope: Scope) -> None:
        scope["splitsam.tenant"] = None
        headers, path = Headers(scope=scope), scope["path"]
        self._access.check_origin(headers)
        if path in OPEN or path.startswith(OPEN_FOLDERS) or scope.get("method") == "OPTIONS":
            return
        token = token_of(headers) or next(
            iter(parse_qs(scope["query_string"].decode("latin-1")).get("api_key", [])), None
        )
        if token is not None or not path.startswith(_TOKEN_INSIDE):
            self._access.admit(scope, token)
            if scope["type"] == "http":
                self._access.take_share(scope)


async def _refuse(scope: Scope, receive: Receive, send: Send, error: GatewayError) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": error.reason})
        return
    if error.status_code == 429:
        await _read_on(receive)
    await error_response(scope, error)(scope, receive, send)


async def _read_on(receive: Receive) -> None:
    """Drop a body as it comes, within its limits: a caller that still sends would not hear when to come again."""
    with contextlib.suppress(GatewayError):
        while (await receive()).get("more_body", False):
            pass
