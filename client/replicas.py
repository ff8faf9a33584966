"""Calls that any replica of a service can answer: sent to one after the other, and again when they ask for it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from splitsam.client.errors import SplitsamError
from splitsam.client.retry import RetryPolicy
from splitsam.client.steps import Collect, Operation, Unary, Wait


def call_any(
    step: Unary | Collect,
    addresses: Sequence[str],
    deadline_s: float,
    *,
    retry: RetryPolicy,
    clock: Callable[[], float],
    no_retry_on: str = "",
) -> Operation[tuple[str, Any]]:
    """Send until it succeeds; who answered, and what.

    A replica that is away is passed over for the next at once. Once none is left, or where all would say the
    same, the wait is the one that the server asks for.

    Args:
        deadline_s: by `clock`.
        no_retry_on: the reason of an error that ends it.
    """
    attempt = 0
    while True:
        attempt += 1
        try:
            return (yield from _call_in_turn(step, addresses, deadline_s, clock))
        except SplitsamError as error:
            wait_s = retry.wait_s(error, attempt, deadline_s - clock(), replicas=len(addresses))
            if wait_s is None or error.reason == no_retry_on:
                raise
            yield Wait(wait_s)


def _call_in_turn(
    step: Unary | Collect, addresses: Sequence[str], deadline_s: float, clock: Callable[[], float]
) -> Operation[tuple[str, Any]]:
    """The first answer; when all replicas are away, the error of one that says when it will be back."""
    away: list[SplitsamError] = []
    for address in addresses:
        left_s = max(deadline_s - clock(), 0.001)
        try:
            return address, (yield replace(step, address=address, timeout_s=left_s))
        except SplitsamError as error:
            if not error.is_of_one_replica:
                raise
            away.append(error)
    raise next((error for error in away if error.retry_delay_s is not None), away[0])
