"""Calls that any replica of a service can answer: sent to one after the other, and again when they ask for it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from splitsam.client.connection import rendezvous
from splitsam.client.errors import SplitsamError
from splitsam.client.names import Address
from splitsam.client.retry import RetryPolicy
from splitsam.client.steps import Collect, Operation, Resolve, Unary, Wait


@dataclass(frozen=True)
class Replicas:
    """Those of a service.

    Args:
        given: addresses and names; what they stand for may change from one call to the next.
        key: of what is asked for, which always goes to the same replica; None for the one that was given first.
    """

    given: tuple[str, ...]
    key: str | None = None

    def in_turn(self, timeout_s: float) -> Operation[tuple[Address, ...]]:
        """In the order in which they are asked."""
        addresses: tuple[Address, ...] = yield Resolve(self.given, timeout_s)
        return addresses if self.key is None else rendezvous(addresses, self.key)


def call_any(
    step: Unary | Collect,
    replicas: Replicas,
    deadline_s: float,
    *,
    retry: RetryPolicy,
    clock: Callable[[], float],
    no_retry_on: str = "",
) -> Operation[tuple[Address, Any]]:
    """Send until it succeeds; who answered, and what.

    A replica that is away is passed over for the next at once. Once none is left, or where all would say the
    same, the wait is the one that the server asks for.

    Args:
        step: the address and the time it has are of no account.
        deadline_s: by `clock`.
        no_retry_on: the reason of an error that ends it.
    """
    attempt = 0
    while True:
        attempt += 1
        away: dict[Address, SplitsamError] = {}
        try:
            return (yield from _call_in_turn(step, replicas, away, deadline_s, clock))
        except SplitsamError as error:
            wait_s = retry.wait_s(error, attempt, deadline_s - clock(), replicas=len(away))
            if wait_s is None or error.reason == no_retry_on:
                raise
            yield Wait(wait_s)


def _call_in_turn(
    step: Unary | Collect,
    replicas: Replicas,
    away: dict[Address, SplitsamError],
    deadline_s: float,
    clock: Callable[[], float],
) -> Operation[tuple[Address, Any]]:
    """The first answer; when all replicas are away, the error of one that says when it will be back.

    Args:
        away: what those failed with, filled in.
    """
    while True:
        in_turn = yield from replicas.in_turn(max(deadline_s - clock(), 0.001))
        address = next((each for each in in_turn if each not in away), None)
        if address is None:
            errors = list(away.values())
            raise next((error for error in errors if error.retry_delay_s is not None), errors[0])
        left_s = max(deadline_s - clock(), 0.001)
        try:
            return address, (yield replace(step, address=address, timeout_s=left_s))
        except SplitsamError as error:
            if not error.is_of_one_replica:
                raise
            away[address] = error
