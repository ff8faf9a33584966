"""What is fuzzed, and what must hold for every input: a right result or one of the project's own refusals.

The same targets are run by hypothesis (`tests/unit/test_fuzz_targets.py`), by the plain loop and by atheris
(`worker.py`).
"""

import contextlib
import resource
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from types import FrameType

from splitsam.common.errors import ServiceError

# Of the processor, so that a busy machine changes nothing. The slowest input allowed takes a tenth of it.
LIMIT_CPU_S = 10.0
LIMIT_MIB = 256.0


class Broken(Exception):
    """The property does not hold for an input: a wrong result, a refusal that names nothing, a limit exceeded."""


@dataclass(frozen=True)
class Target:
    """Something that reads what strangers send.

    Args:
        make: an input, from nothing but the randomness given.
        check: reads an input; what became of it in a word or two. Raises Broken, or whatever the code under test
            should not have raised.
        share: of a thousand inputs, how many are this target's.
    """

    name: str
    make: Callable[[Random], bytes]
    check: Callable[[bytes], str]
    share: int


def judge(target: Target, data: bytes) -> str:
    """What became of an input, within bounds of time and memory.

    Raises:
        Broken: the property does not hold.
        Exception: what the code under test should not have raised.
    """
    before_mib = peak_mib()
    with _limited_cpu(), warnings.catch_warnings():
        warnings.simplefilter("error")
        outcome = target.check(data)
    if (grown_mib := peak_mib() - before_mib) > LIMIT_MIB:
        raise Broken(f"took {grown_mib:.0f} MiB more than anything before it")
    return outcome


def refusal(error: ServiceError, field_known: Callable[[str], bool]) -> str:
    """The outcome for a refusal that says what is wrong where.

    Args:
        field_known: whether a path is one of a field of the request.

    Raises:
        Broken: it does not.
    """
    for violation in error.violations:
        if not field_known(violation.field) or not violation.description:
            raise Broken(f"the refusal names {violation.field!r}: {violation.description!r}")
    if error.reason == "INVALID_ARGUMENT" and not error.violations:
        raise Broken(f"the refusal names no field: {error.message!r}")
    if not 0 < len(error.message) <= 500 or not error.message.isprintable():
        raise Broken(f"nobody wants to read {error.message!r}")
    return error.reason


def peak_mib() -> float:
    """The most memory that this process has had resident (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextlib.contextmanager
def _limited_cpu() -> Iterator[None]:
    def stop(_number: int, _frame: FrameType | None) -> None:
        raise Broken(f"took more than {LIMIT_CPU_S:g} s of the processor")

    old = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)
