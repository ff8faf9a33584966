"""Fuzzed requests to services that run: none may crash, hang, answer INTERNAL or UNKNOWN, or keep the memory."""

import asyncio
import collections
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from random import Random

import grpc
from google.rpc import error_details_pb2, status_pb2

from bench.fuzz.frames import exchange, make_connection
from bench.fuzz.messages import is_path
from bench.fuzz.wire_cases import CANCEL, CLOSE, Case, Known, make_case
from splitsam.v1 import decoder_pb2, encoder_pb2

CALLERS = 8
# Past the longest deadline of a case.
_HANG_S = 120.0
_GREETING_BYTES = 100  # a server's settings come before any answer
_SILENCE_S = 0.05
# grpc.aio's own, in place of the status, where a call has ended before all was written; the service's log and metrics
# say what it was.
_OWN_ERROR = "Internal error from Core"
_FAULTS = ("INTERNAL", "UNKNOWN", "DATA_LOSS")
_STREAM_REPLIES = {
    "PredictMasksStream": decoder_pb2.PredictMasksStreamResponse,
    "EncodeImages": encoder_pb2.EncodeImagesResponse,
}
_OPTIONS = [
    *(("grpc.max_send_message_length", -1), ("grpc.enable_http_proxy", 0), ("grpc.enable_retries", 0)),
    ("grpc.max_metadata_size", 2**20),
]


@dataclass
class WireReport:
    """What became of the requests of one kind.

    Args:
        outcomes: status codes and how often, `INVALID_ARGUMENT` and the like.
        faults: by what went wrong, the number of the first request it happened to.
    """

    requests: int = 0
    seconds: float = 0.0
    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    faults: dict[str, int] = field(default_factory=dict)


async def send_all(
    addresses: dict[str, str],
    known: Known,
    *,
    seed: int,
    numbers: Sequence[int],
    reports: dict[str, WireReport],
    check: Callable[[], None],
) -> None:
    """Send the requests of a seed with these numbers, some at a time.

    Args:
        addresses: host:port of `encoder` and `decoder`.
        reports: for each kind of request what became of them, filled here.
        check: called between requests; what it raises ends all, in a group.
    """
    left = iter(numbers)
    async with contextlib.AsyncExitStack() as stack:
        channels = {
            name: await stack.enter_async_context(grpc.aio.insecure_channel(address, _OPTIONS))
            for name, address in addresses.items()
        }

        async def caller() -> None:
            for number in left:
                check()
                random = Random(f"{seed} wire {number}")
                case = await asyncio.to_thread(make_case, random, known)
                start_s = time.monotonic()
                try:
                    async with asyncio.timeout(_HANG_S):
                        outcome, fault = await _send(case, random, channels, addresses, known)
                except TimeoutError:
                    outcome, fault = "hang", "no answer"
                report = reports.setdefault(case.kind, WireReport())
                report.requests += 1
                report.seconds += (time.monotonic() - start_s) / CALLERS
                report.outcomes[outcome] += 1
                if fault:
                    report.faults.setdefault(f"{case.method.path}: {fault}", number)

        async with asyncio.TaskGroup() as group:
            for _ in range(CALLERS):
                group.create_task(caller())


async def _send(
    case: Case, random: Random, channels: dict[str, grpc.aio.Channel], addresses: dict[str, str], known: Known
) -> tuple[str, str]:
    """The outcome, and what is wrong with it: empty for nothing."""
    if case.kind == "frames":
        data = make_connection(random, case.method.path, known.token)
        try:
            received, hung_up = await exchange(addresses[case.method.service], data)
        except OSError as error:
            return "no connection", f"no connection: {error}"
        return "hung up" if hung_up else "answered" if len(received) > _GREETING_BYTES else "silence", ""
    channel = channels[case.method.service]
    call = channel.stream_stream(case.method.path)(timeout=case.timeout_s, metadata=case.metadata)
    replies: list[bytes] = []
    try:
        await _converse(call, case, replies)
    except (grpc.aio.AioRpcError, grpc.aio.InternalError, asyncio.InvalidStateError):  # it ended while we wrote
        pass
    except asyncio.CancelledError:
        if not call.cancelled():
            raise
    finally:
        call.cancel()
    code, details = await call.code(), await call.details()
    wrong = _wrong_replies(case, replies)
    if details == _OWN_ERROR:
        return "ended early", wrong
    if code.name in _FAULTS:
        return code.name, f"{code.name} {details!r}"
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        wrong = wrong or _wrong_refusal(case, await call.trailing_metadata())
    return code.name, wrong


async def _converse(call: grpc.aio.StreamStreamCall, case: Case, replies: list[bytes]) -> None:
    for body in case.bodies:
        await call.write(body)
    if case.ending == CLOSE:
        await call.done_writing()
        async for reply in _replies(call):
            replies.append(reply)
        return
    if case.ending != CANCEL:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SILENCE_S):
                async for reply in _replies(call):
                    replies.append(reply)
    call.cancel()


async def _replies(call: grpc.aio.StreamStreamCall) -> AsyncIterator[bytes]:
    while (reply := await call.read()) is not grpc.aio.EOF:
        yield reply


def _wrong_replies(case: Case, replies: Sequence[bytes]) -> str:
    kind = _STREAM_REPLIES.get(case.method.path.rpartition("/")[2])
    errors = [kind.FromString(reply).error for reply in replies] if kind else []
    return next((f"a reply of the stream says {error.reason}" for error in errors if error.reason == "INTERNAL"), "")


def _wrong_refusal(case: Case, trailing: Sequence[tuple[str, str | bytes]]) -> str:
    """A refusal of the request must name its field."""
    details = dict(trailing).get("grpc-status-details-bin", b"")
    status = status_pb2.Status.FromString(details if isinstance(details, bytes) else b"")
    bad = error_details_pb2.BadRequest()
    fields = [violation.field for detail in status.details if detail.Unpack(bad) for violation in bad.field_violations]
    if fields and all(field == "request" or is_path(case.method.request, field) for field in fields):
        return ""
    return f"INVALID_ARGUMENT names {fields}"
