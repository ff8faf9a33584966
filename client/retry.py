"""When a failed call may be sent again, and how long to wait before: where the server asks for a time, exactly that."""

from collections.abc import Callable
from dataclasses import dataclass

import grpc

from splitsam.client.errors import SplitsamError

_RETRYABLE = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 10.0
_MISMATCH_PAUSE_S = 1.0


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


# Where nobody waits: it outlasts a queue that stays full and, once a pass has begun, the restart of the only server.
PATIENT = RetryPolicy(attempts=20)


@dataclass
class Renewals:
    """When the embedding behind a prompt is made anew: once when it has expired, and while the model is replaced.

    Callers that are moved to another model may reach its decoder before its encoder, or the other way round: until
    both have followed, each new embedding is of the wrong model again. A connection that was opened in between leads
    to the old model for as long as that runs: from the second time on, connections are left.

    Args:
        until_s: by `clock`, how long the two may be of different models.
        clock: seconds, monotonic.
    """

    until_s: float
    clock: Callable[[], float]
    _has_expired: bool = False
    _mismatches: int = 0

    @property
    def has_been_in_vain(self) -> bool:
        """Whether a fresh embedding was again of another model than the decoder's."""
        return self._mismatches > 1

    def wait_s(self, error: SplitsamError) -> float | None:
        """How long to wait before encoding again, or None when that would not help."""
        if error.reason == "EMBEDDING_EXPIRED" and not self._has_expired:
            self._has_expired = True
            return 0.0
        if error.reason != "MODEL_MISMATCH":
            return None
        pause_s = 0.0 if self._mismatches == 0 else min(_FIRST_PAUSE_S * 2 ** (self._mismatches - 1), _MISMATCH_PAUSE_S)
        self._mismatches += 1
        return pause_s if self.clock() + pause_s < self.until_s else None
