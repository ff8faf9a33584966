"""When a failed call may be sent again, and how long to wait before: exactly as long as the server asks."""

from dataclasses import dataclass

import grpc

from splitsam.client.errors import SplitsamError

_RETRYABLE = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 10.0


@dataclass(frozen=True)
class RetryPolicy:
    """How often a call may be sent in all, to every replica of the service each time."""

    attempts: int = 5

    def wait_s(self, error: SplitsamError, attempt: int, remaining_s: float, *, replicas: int = 1) -> float | None:
        """How long to wait before the next attempt, or None when there must not be one.

        Args:
            error: what the attempt failed with.
            attempt: which one failed, the first being 1.
            remaining_s: time left until the deadline of the whole call.
            replicas: addresses of the service. That one alone cannot be reached is said at once; several that all
                cannot are most likely in the middle of a restart, and asked again after 0.1, 0.2, 0.4, ... seconds,
                at most 10.
        """
        if error.code not in _RETRYABLE or attempt >= self.attempts:
            return None
        wait_s = error.retry_delay_s
        if wait_s is None and replicas > 1 and error.is_of_one_replica:
            wait_s = min(_FIRST_PAUSE_S * 2 ** (attempt - 1), _LONGEST_PAUSE_S)
        return wait_s if wait_s is not None and wait_s < remaining_s else None
