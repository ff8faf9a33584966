"""The exceptions a service may raise; each carries its gRPC code, stable reason and retry delay as data.

`observed.py` turns them into `google.rpc.Status`, as `status.py` writes it; nothing else calls `abort`.
"""

from dataclasses import dataclass

import grpc


@dataclass(frozen=True)
class FieldViolation:
    """A request field that was refused: its path in the message and what is allowed."""

    field: str
    description: str


_LEAST_RETRY_S, _LONGEST_RETRY_S = 0.05, 30.0


def bounded_retry_s(estimate_s: float) -> float:
    """When a caller is told to come again: estimates of almost nothing, or of minutes, are not worth following."""
    return min(_LONGEST_RETRY_S, max(_LEAST_RETRY_S, estimate_s))


class ServiceError(Exception):
    """An error the caller may see.

    Args:
        message: one sentence for a person; it reaches the client.
        retry_delay_s: when a retry makes sense, how long to wait first.
    """

    code = grpc.StatusCode.INTERNAL
    reason = "INTERNAL"

    def __init__(self, message: str, *, retry_delay_s: float | None = None, metadata: dict[str, str] | None = None):
        super().__init__(message)
        self.message = message
        self.retry_delay_s = retry_delay_s
        self.metadata = metadata or {}
        self.violations: list[FieldViolation] = []


class InvalidArgument(ServiceError):
    """Bad input: names the field and the limit."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_ARGUMENT"

    def __init__(self, field: str, description: str):
        super().__init__(f"{field}: {description}")
        self.violations = [FieldViolation(field, description)]


class EmbeddingExpired(ServiceError):
    """The embedding is unknown, evicted or expired: encode the image again."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "EMBEDDING_EXPIRED"


class RefinementExpired(ServiceError):
    """The logits behind a refinement token are gone: send the prompts again without it."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "REFINEMENT_EXPIRED"


class ModelMismatch(ServiceError):
    """The embedding was made by another model than this decoder's."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "MODEL_MISMATCH"


class QueueFull(ServiceError):
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "QUEUE_FULL"


class UploadTooSlow(ServiceError):
    """The bytes of the request did not arrive in time, and others wait for the room."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "UPLOAD_TOO_SLOW"


class DeadlineTooShort(ServiceError):
    """The work cannot be finished before the caller's deadline."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "DEADLINE_TOO_SHORT"


class DeviceOutOfMemory(ServiceError):
    """The work did not fit into the device's memory beside what is there."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "DEVICE_OUT_OF_MEMORY"


class QuotaExceeded(ServiceError):
    """The tenant has used up what it may ask for, for now."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "QUOTA_EXCEEDED"


class ReplyTooLarge(ServiceError):
    """The answer would exceed what a stock client accepts: ask for fewer prompts or formats."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "REPLY_TOO_LARGE"


class NotReady(ServiceError):
    """The service is loading or draining."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "NOT_READY"


class CacheUnavailable(ServiceError):
    """Redis is needed for this request and does not answer."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "CACHE_UNAVAILABLE"


class EncoderUnavailable(ServiceError):
    """The encoder service is needed for this request and does not answer."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "ENCODER_UNAVAILABLE"


class EncoderFailed(ServiceError):
    """The encoder service, called in the caller's name, gave no embedding; `code` and `reason` may be its own."""

    reason = "ENCODER_FAILED"

    def __init__(
        self,
        message: str,
        code: grpc.StatusCode = grpc.StatusCode.INTERNAL,
        reason: str = reason,
        *,
        retry_delay_s: float | None = None,
        metadata: dict[str, str] | None = None,
    ):
        super().__init__(message, retry_delay_s=retry_delay_s, metadata=metadata)
        self.code, self.reason = code, reason


class Unauthenticated(ServiceError):
    code = grpc.StatusCode.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"


class NotServed(ServiceError):
    """The request is part of the API, and this deployment is not set up for it."""

    code = grpc.StatusCode.UNIMPLEMENTED
    reason = "NOT_IMPLEMENTED"


class InternalError(ServiceError):
    """A defect; the details are in the log under the request id."""


class DeviceLost(Exception):
    """The process cannot compute or serve any more and has to end; the message says why. Never raised to a client."""


class StartProblem(Exception):
    """Why a process cannot start, in one line: what would break the line or the terminal is written as an escape."""

    def __init__(self, message: str):
        letters = (letter if letter.isprintable() else repr(letter)[1:-1] for letter in message)
        super().__init__("".join(letters))


class CheckpointError(StartProblem):
    """The weights cannot be loaded; the message says what to do. Raised at start, never to a client."""
