"""When a failed call may be sent again: only when the server says so, after exactly the wait it names."""

from dataclasses import dataclass

import grpc

from splitsam.client.errors import SplitsamError

_RETRYABLE = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)


@dataclass(frozen=True)
class RetryPolicy:
    """How often a call may be sent in all."""

    attempts: int = 5

    def wait_s(self, error: SplitsamError, attempt: int, remaining_s: float) -> float | None:
        """How long to wait before the next attempt, or None when there must not be one.

        Args:
            error: what the attempt failed with.
            attempt: which one failed, the first being 1.
            remaining_s: time left until the deadline of the whole call.
        """
        if error.code not in _RETRYABLE or error.retry_delay_s is None or attempt >= self.attempts:
            return None
        return error.retry_delay_s if error.retry_delay_s < remaining_s else None
