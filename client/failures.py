"""What a long pass reports of things that failed, and its exit status."""

from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from splitsam.client.errors import SplitsamError

DONE, AGAIN, BAD_INPUT = 0, 1, 3


@dataclass(frozen=True)
class Failure:
    """An image, or an entry of a file, that could not be done; `is_final` when trying again would change nothing."""

    image: str
    message: str
    is_final: bool

    def __str__(self) -> str:
        return f"{self.image}: {self.message}"


def exit_status(failures: Sequence[Failure]) -> int:
    """0: all is done; 1: another run may do more; 3: all but what never will be."""
    if not all(failure.is_final for failure in failures):
        return AGAIN
    return BAD_INPUT if failures else DONE


def image_failure(image: str, error: BaseException | None) -> Failure:
    """Why an image was not done; without an error the cache did not take its embedding."""
    if error is None:
        return Failure(image, "encoded, but the cache did not take it", is_final=False)
    if isinstance(error, OSError):
        return Failure(image, error.strerror or str(error), is_final=isinstance(error, FileNotFoundError))
    is_refused = isinstance(error, SplitsamError) and error.code is grpc.StatusCode.INVALID_ARGUMENT
    return Failure(image, str(error), is_final=is_refused)
