"""ASGI middleware that lets in who may come in; what it refuses never reaches a route."""

from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from splitsam.gateway.access import Access, token_of
from splitsam.gateway.error_forms import error_response
from splitsam.gateway.errors import GatewayError

# Nothing of a caller is to be had there.
OPEN = ("/", "/docs", "/openapi.json", "/health", "/livez", "/readyz")
OPEN_FOLDERS = ("/assets/",)
# What comes there may have its token inside a message; the route asks for it when `splitsam.tenant` is None.
_TOKEN_INSIDE = ("/v1/pointer", "/sam2/")


class Gate:
    """Checks the page that a browser calls from, and the token: in a header, or as the query's `api_key`."""

    def __init__(self, app: ASGIApp, access: Access):
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
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


async def _refuse(scope: Scope, receive: Receive, send: Send, error: GatewayError) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": error.reason})
    else:
        await error_response(scope, error)(scope, receive, send)
