"""Errors as gRPC's rich status: `google.rpc.Status` with details that a program can read."""

from collections.abc import Mapping
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2

from splitsam.common.errors import ServiceError

ERROR_DOMAIN = "splitsam.v1"


async def abort_with(context: grpc.aio.ServicerContext, error: ServiceError, request_id: str) -> None:
    """Answer with a rich status: ErrorInfo always, BadRequest and RetryInfo where they apply."""
    trailing = [("grpc-status-details-bin", rich_status(error, request_id).SerializeToString())]
    trailing.append(("x-request-id", request_id))
    if error.retry_delay_s is not None:
        trailing.append(("grpc-retry-pushback-ms", str(round(error.retry_delay_s * 1000))))
    await context.abort(error.code, error.message, trailing_metadata=tuple(trailing))


def rich_status(error: ServiceError, request_id: str) -> status_pb2.Status:
    metadata: Mapping[str, str] = {**error.metadata, "request_id": request_id}
    details: list[Any] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN, metadata=metadata),
    ]
    if error.violations:
        violations = [
            error_details_pb2.BadRequest.FieldViolation(field=v.field, description=v.description)
            for v in error.violations
        ]
        details.append(error_details_pb2.BadRequest(field_violations=violations))
    if error.retry_delay_s is not None:
        delay = Duration()
        delay.FromNanoseconds(round(error.retry_delay_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        message = AnyMessage()
        message.Pack(detail)
        packed.append(message)
    return status_pb2.Status(code=getattr(code_pb2, error.code.name), message=error.message, details=packed)
