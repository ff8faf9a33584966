"""When a call is sent again, and how long the client waits before."""

import grpc
import pytest

from splitsam.client.connection import connection
from splitsam.client.errors import SplitsamError, error_from_item, error_from_rpc
from splitsam.client.names import Address
from splitsam.client.operations import Operations
from splitsam.client.retry import RetryPolicy
from splitsam.client.steps import Resolve, Unary, Wait
from splitsam.v1 import types_pb2

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def error(code=EXHAUSTED, retry_delay_s=0.25):
    return SplitsamError("no", code=code, reason="NO", retry_delay_s=retry_delay_s)


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_only_full_and_unavailable_are_retried(code):
    wait_s = RetryPolicy().wait_s(error(code), attempt=1, remaining_s=10)
    assert wait_s == (0.25 if code in (EXHAUSTED, UNAVAILABLE) else None)


def test_no_retry_without_a_delay():
    assert RetryPolicy().wait_s(error(retry_delay_s=None), attempt=1, remaining_s=10) is None


def test_no_retry_after_the_last_attempt():
    policy = RetryPolicy(attempts=3)
    assert [policy.wait_s(error(), attempt, remaining_s=10) for attempt in (1, 2, 3)] == [0.25, 0.25, None]


def test_no_retry_that_would_come_too_late():
    assert RetryPolicy().wait_s(error(), attempt=1, remaining_s=0.2) is None


def test_waits_are_as_long_as_asked_and_shorten_what_remains():
    now_s = 100.0
    operations = Operations(connection("e:1", "d:1"), 30.0, 10.0, clock=lambda: now_s)
    operation = operations.predict([("key", [])], {})
    assert next(operation) == Resolve(("d:1",), 10.0)
    operation.send((Address("d:1"),))
    first = operation.send((Address("d:1"),))
    assert isinstance(first, Unary)
    assert first.timeout_s == 10.0
    now_s += 1
    assert operation.throw(error(retry_delay_s=0.75)) == Wait(0.75)
    now_s += 0.75
    assert operation.send(None).timeout_s == pytest.approx(8.25)
    assert operation.send((Address("d:1"),)).timeout_s == pytest.approx(8.25)


class FailedCall(grpc.RpcError):
    """An RpcError as grpc raises it."""

    def __init__(self, trailing, code=EXHAUSTED):
        self._trailing = trailing
        self._code = code

    def code(self):
        return self._code

    def details(self):
        return "details"

    def trailing_metadata(self):
        return self._trailing


@pytest.mark.parametrize(
    ("pushback", "expected_s"), [("250", 0.25), ("0", 0.0), ("-1", None), ("soon", None), (None, None)]
)
def test_pushback_is_read_from_trailing_metadata(pushback, expected_s):
    trailing = () if pushback is None else (("grpc-retry-pushback-ms", pushback),)
    assert error_from_rpc(FailedCall(trailing), "d:1").retry_delay_s == expected_s


def test_malformed_details_do_not_hide_the_error():
    found = error_from_rpc(FailedCall((("grpc-status-details-bin", b"\xff\xff"),)), "d:1")
    assert (found.reason, found.message) == ("RESOURCE_EXHAUSTED", "d:1: details")


def test_missing_metadata_is_no_metadata():
    assert error_from_rpc(FailedCall(None), "d:1").metadata == {}


def test_item_error_is_the_same_class():
    item = types_pb2.ItemError(
        code=3,
        reason="INVALID_ARGUMENT",
        message="image: bad",
        field_violations=[types_pb2.ItemFieldViolation(field="image", description="bad")],
    )
    found = error_from_item(item)
    assert found.code is grpc.StatusCode.INVALID_ARGUMENT
    assert found.violations[0].field == "image"
    assert found.retry_delay_s is None


def test_item_error_with_an_unknown_code_is_unknown():
    assert error_from_item(types_pb2.ItemError(code=99)).code is grpc.StatusCode.UNKNOWN
