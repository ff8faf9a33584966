"""Errors in the form that each tool reads: our own for the JSON API, theirs for the routes that speak like them."""

from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Scope

from splitsam.client.errors import SplitsamError
from splitsam.common.errors import FieldViolation
from splitsam.gateway import label_studio, osam, roboflow
from splitsam.gateway.errors import GatewayError, from_service, request_id_of

_MOST_FIELDS = 10
_SENTENCES = {
    404: ("NO_SUCH_ROUTE", "There is nothing at this address; /docs lists what there is."),
    405: ("METHOD_NOT_ALLOWED", "This address takes another HTTP method; /docs lists what there is."),
}
INTERNAL = GatewayError(500, "INTERNAL", "The gateway failed; its log has the details under this request's id.")


def error_response(scope: Scope, error: GatewayError) -> JSONResponse:
    """The answer to a request that failed."""
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, round(error.retry_after_s)))
    if error.status_code == 401:
        headers["www-authenticate"] = "Bearer"
    form = next((form for prefix, form in _FORMS if scope["path"].startswith(prefix)), own_form)
    return JSONResponse(form(error, request_id_of(scope)), error.status_code, headers)


def own_form(error: GatewayError, request_id: str) -> dict[str, Any]:
    """`messages.ErrorAnswer`."""
    retry_after_ms = None if error.retry_after_s is None else round(error.retry_after_s * 1000)
    detail = {
        "reason": error.reason,
        "message": error.message,
        "fields": [{"field": each.field, "description": each.description} for each in error.fields],
        "retry_after_ms": retry_after_ms,
        "request_id": request_id,
    }
    return {"error": detail}


_FORMS: tuple[tuple[str, Callable[[GatewayError, str], dict[str, Any]]], ...] = (
    ("/sam2/", roboflow.error_form),
    ("/api/", osam.error_form),
    *((route, label_studio.error_form) for route in label_studio.ROUTES),
)


def as_gateway_error(error: Exception) -> GatewayError:
    """What a caller is told of anything that was raised."""
    match error:
        case GatewayError():
            return error
        case SplitsamError():
            return from_service(error)
        case RequestValidationError():
            return bad_request([{**each, "loc": each["loc"][1:]} for each in error.errors()])
        case ValidationError():
            return bad_request(error.errors())
        case HTTPException(status_code=status):
            reason, sentence = _SENTENCES.get(status, ("REFUSED", str(error.detail)))
            return GatewayError(status, reason, sentence)
    return INTERNAL


def install(app: FastAPI) -> None:
    """Answer what a route raises; defects go on to `observed`."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return error_response(request.scope, as_gateway_error(error))

    for kind in (HTTPException, RequestValidationError, ValidationError, SplitsamError):
        app.add_exception_handler(kind, answer)


def bad_request(errors: Sequence[Any]) -> GatewayError:
    """What pydantic found wrong with a message."""
    fields = [FieldViolation(_path(each["loc"]), _sentence(each)) for each in errors[:_MOST_FIELDS]]
    first = fields[0]
    return GatewayError(400, "INVALID_ARGUMENT", f"{first.field}: {first.description}", fields=fields)


def _path(location: Sequence[Any]) -> str:
    """`("points", 0, 1)` as `points[0][1]`."""
    words = [f"[{word}]" if isinstance(word, int) else f".{word}" for word in location]
    return "".join(words).lstrip(".") if words and isinstance(location[0], str) else "request"


def _sentence(error: Any) -> str:
    match error["type"]:
        case "json_invalid":
            return "is not JSON"
        case "missing":
            return "is required"
        case "extra_forbidden":
            return "is not known here"
    message: str = error["msg"]
    return message[:1].lower() + message[1:]
