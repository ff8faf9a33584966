"""What a caller is told when something went wrong: a sentence for whoever labels, a stable reason for programs."""

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

import grpc
from starlette.exceptions import HTTPException

from splitsam.client.errors import SplitsamError
from splitsam.common.calls import Call
from splitsam.common.errors import FieldViolation

log = logging.getLogger("splitsam.gateway")

_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.FAILED_PRECONDITION: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    grpc.StatusCode.UNIMPLEMENTED: 501,
}
# By the reason a service gave, else by its code. Where neither is here, the service's own sentence is for the caller.
_SENTENCES = {
    "EMBEDDING_EXPIRED": "This image is no longer kept, or was never opened here: open it again.",
    "REFINEMENT_EXPIRED": "The mask to refine is no longer kept: click again without it.",
    "MODEL_MISMATCH": "The model has changed since this image was opened: open it again.",
    "UNAVAILABLE": "The segmentation service cannot be reached; try again in a moment.",
    "DEADLINE_EXCEEDED": "The segmentation service took too long; try again in a moment.",
    "UNAUTHENTICATED": "The segmentation service does not accept this gateway's credentials: tell whoever runs it.",
    "PERMISSION_DENIED": "The segmentation service does not accept this gateway's credentials: tell whoever runs it.",
}
_BROKEN = "The segmentation service failed; its log has the details under this request's id."
# What a service is sent has one image with one prompt around what the gateway was sent.
_FIELD_NAMES = (
    (re.compile(r"\bimages\[0\]\.prompts\[0\]\.?"), ""),
    (re.compile(r"\b(?:images\[0\]\.)?embedding_key\b"), "key"),
    (re.compile(r"\boutput\."), ""),
)


class GatewayError(HTTPException):
    """An error the caller may see.

    Args:
        status: of HTTP.
        reason: stable and upper-case, e.g. "IMAGE_TOO_LARGE".
        message: one sentence for a person.
        fields: what was refused, by its name in the request.
        retry_after_s: when a retry makes sense, how long to wait first.
    """

    def __init__(
        self,
        status: int,
        reason: str,
        message: str,
        *,
        fields: Iterable[FieldViolation] = (),
        retry_after_s: float | None = None,
    ):
        super().__init__(status, message)
        self.reason = reason
        self.message = message
        self.fields = tuple(fields)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.message} [{self.reason}]"


def bad_field(field: str, description: str) -> GatewayError:
    """Bad input: names the field and what is allowed."""
    return GatewayError(400, "INVALID_ARGUMENT", f"{field}: {description}", fields=[FieldViolation(field, description)])


def too_large(what: str, max_bytes: int) -> GatewayError:
    return GatewayError(413, "TOO_LARGE", f"{what} has more than {max_bytes} bytes, the most that is accepted here.")


def from_service(error: SplitsamError) -> GatewayError:
    """What a service's failure is to our caller; where the services are, and what gRPC says, goes to the log alone."""
    status = _STATUS.get(error.code, 502)
    if status >= 500:
        log.warning("a service failed", extra={"problem": str(error), "code": error.code.name})
    has_own_sentence = bool(error.metadata or error.violations) and status != 502
    default = _SENTENCES.get(error.code.name) or (error.message if has_own_sentence else _BROKEN)
    fields = [FieldViolation(_renamed(each.field), each.description) for each in error.violations]
    return GatewayError(
        status,
        error.reason,
        _renamed(_SENTENCES.get(error.reason) or default),
        fields=fields,
        retry_after_s=error.retry_delay_s,
    )


def _renamed(text: str) -> str:
    for pattern, name in _FIELD_NAMES:
        text = pattern.sub(name, text)
    return text


def request_id_of(scope: Mapping[str, Any]) -> str:
    """What names a request in the logs, by its ASGI scope."""
    call: Call | None = scope.get("splitsam.call")
    return call.request_id if call else ""
