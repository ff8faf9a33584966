"""The one exception of the client, and how a gRPC failure becomes it."""

from collections.abc import Iterable, Mapping
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status.rpc_status import GRPC_DETAILS_METADATA_KEY

from splitsam.client.names import Address
from splitsam.common.errors import FieldViolation
from splitsam.v1 import types_pb2

PUSHBACK_METADATA_KEY = "grpc-retry-pushback-ms"
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class SplitsamError(Exception):
    """A service refused or failed a call, or could not be reached.

    Args:
        message: one sentence for a person.
        code: the gRPC status.
        reason: stable and upper-case, e.g. "EMBEDDING_EXPIRED"; the name of the code where the server gave none.
        violations: the fields that were refused and what is allowed.
        retry_delay_s: how long the server asks to wait before a retry; None when it did not ask for one.
        metadata: what else the server says of the reason.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode,
        reason: str,
        violations: Iterable[FieldViolation] = (),
        retry_delay_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.violations = tuple(violations)
        self.retry_delay_s = retry_delay_s
        self.metadata = dict(metadata or {})

    @property
    def request_id(self) -> str | None:
        """What names this call in the server's log."""
        return self.metadata.get("request_id")

    @property
    def is_of_one_replica(self) -> bool:
        """Whether another replica of the service may answer at once: this one is gone, loading or draining.

        Every call may be sent again: encoding and predicting twice gives the same. All replicas share one cache and
        call the same encoders.
        """
        shared = ("CACHE_UNAVAILABLE", "ENCODER_UNAVAILABLE")
        return self.code is grpc.StatusCode.UNAVAILABLE and self.reason not in shared

    @property
    def is_of_a_server_that_goes(self) -> bool:
        """Whether the server itself said that it is loading or draining, so that its connection is of no use now."""
        return self.reason == "NOT_READY"

    def __str__(self) -> str:
        reason = self.reason
        if self.code is grpc.StatusCode.INTERNAL and self.request_id:
            reason += f", request {self.request_id}"
        return f"{self.message} [{reason}]"


def error_from_rpc(error: grpc.RpcError, address: Address | str) -> SplitsamError:
    """What a failed call of `grpc` or `grpc.aio` says, details included.

    Args:
        error: as the call raised it.
        address: where the call went, for failures that no server had a part in.
    """
    trailing = [(str(key), value) for key, value in error.trailing_metadata() or ()]
    status = _status_of(trailing)
    code = error.code() or grpc.StatusCode.UNKNOWN
    info, bad_request, retry = (_unpacked(status, kind) for kind in _DETAIL_TYPES)
    if code is grpc.StatusCode.CANCELLED and info is None and error.details() not in _CANCELLED_HERE:
        return stream_ended(f"{address}: the server ended the call")
    retry_delay_s = None
    if retry is not None:
        retry_delay_s = retry.retry_delay.ToTimedelta().total_seconds()
    violations = bad_request.field_violations if bad_request is not None else ()
    message = f"{address}: {error.details() or code.value[1]}" if info is None else status.message
    return SplitsamError(
        message,
        code=code,
        reason=info.reason if info is not None else code.name,
        violations=[FieldViolation(violation.field, violation.description) for violation in violations],
        retry_delay_s=_pushback_s(trailing, retry_delay_s),
        metadata=dict(info.metadata) if info is not None else None,
    )


def error_from_item(error: types_pb2.ItemError) -> SplitsamError:
    """What an item of a stream failed with."""
    code = _CODES.get(error.code, grpc.StatusCode.UNKNOWN)
    return SplitsamError(
        error.message,
        code=code,
        reason=error.reason or code.name,
        violations=[FieldViolation(violation.field, violation.description) for violation in error.field_violations],
        retry_delay_s=error.retry_delay_ms / 1000 if error.retry_delay_ms else None,
    )


def too_large(field: str, size_bytes: int, max_bytes: int) -> SplitsamError:
    """What the server would say of a field that is too large to reach it."""
    description = f"has {size_bytes} bytes; at most {max_bytes} are allowed"
    return SplitsamError(
        f"{field}: {description}",
        code=grpc.StatusCode.INVALID_ARGUMENT,
        reason="INVALID_ARGUMENT",
        violations=[FieldViolation(field, description)],
    )


def stream_ended(message: str) -> SplitsamError:
    """The server ended a stream, or a call, while it owed answers, as when it shuts down: its successor has room."""
    return SplitsamError(message, code=grpc.StatusCode.UNAVAILABLE, reason="STREAM_ENDED", retry_delay_s=0.5)


def stream_broken(message: str) -> SplitsamError:
    """The server did not keep to the protocol of a stream."""
    return SplitsamError(message, code=grpc.StatusCode.INTERNAL, reason="STREAM_BROKEN")


# What grpc says where this side has cancelled the call (grpc 1.85).
_CANCELLED_HERE = ("Channel closed!", "Locally cancelled by application!")
_DETAIL_TYPES = (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo)


def _status_of(trailing: list[tuple[str, str | bytes]]) -> status_pb2.Status:
    for key, value in trailing:
        if key == GRPC_DETAILS_METADATA_KEY:
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                break
    return status_pb2.Status()


def _unpacked(status: status_pb2.Status, kind: Any) -> Any:
    for detail in status.details:
        message = kind()
        if detail.Unpack(message):
            return message
    return None


def _pushback_s(trailing: list[tuple[str, str | bytes]], retry_delay_s: float | None) -> float | None:
    """The wait asked for; a negative or malformed pushback means "do not retry", as in gRPC's own retries."""
    for key, value in trailing:
        if key == PUSHBACK_METADATA_KEY:
            text = str(value)
            return int(text) / 1000 if text.isdecimal() else None
    return retry_delay_s
