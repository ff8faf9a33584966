"""Performs the steps of an operation with `grpc`, blocking."""

import functools
import hashlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import wait
from queue import SimpleQueue
from typing import Any

import grpc

from splitsam.client.answers import read_source
from splitsam.client.channels import Channels, Line
from splitsam.client.connection import Connection
from splitsam.client.errors import SplitsamError, error_from_rpc
from splitsam.client.names import JUST_NOW_S, Address, Names
from splitsam.client.spans import call_span, operation_span
from splitsam.client.steps import (
    CloseBulk,
    Collect,
    Emit,
    Follow,
    Leave,
    Load,
    OpenBulk,
    Operation,
    ReceiveBulk,
    Resolve,
    SendBulk,
    Step,
    T,
    Tell,
    Unary,
    Wait,
    resume,
)
from splitsam.common import tracing
from splitsam.v1 import decoder_pb2_grpc, encoder_pb2, encoder_pb2_grpc

STUBS: dict[str, Any] = {"encoder": encoder_pb2_grpc.EncoderServiceStub, "decoder": decoder_pb2_grpc.DecoderServiceStub}


class Transport:
    """The channels of a synchronous client."""

    def __init__(self, where: Connection) -> None:
        self._where = where
        self._names = Names((*where.encoders, *where.decoders))
        self._channels = Channels(where, self._names.current)
        self._told: set[Any] = set()

    def close(self) -> None:
        self._channels.close()

    def run(self, operation: Operation[T]) -> T:
        """Perform an operation that emits nothing on the way, and return its result."""
        with operation_span(operation) as span, tracing.within(span):
            try:
                step = next(operation)
                while True:
                    step = resume(operation, self._outcome(step, None))
            except StopIteration as stop:
                result: T = stop.value
                return result

    def results(self, operation: Operation[None]) -> Iterator[Any]:
        """Perform an operation on a stream and hand out what it emits."""
        stream = _Stream(self._where, self._channels)
        with operation_span(operation) as span:
            try:
                step = next(operation)
                while True:
                    if isinstance(step, Emit):
                        yield step.result
                        step = next(operation)
                    else:
                        with tracing.within(span):
                            outcome = self._outcome(step, stream)
                        step = resume(operation, outcome)
            except StopIteration:
                return
            finally:
                stream.abandon()

    def _outcome(self, step: Step, stream: "_Stream | None") -> Any:
        try:
            return self._perform(step) if stream is None else self._perform_on(stream, step)
        except (SplitsamError, OSError) as error:
            return error

    def _perform(self, step: Step) -> Any:
        match step:
            case Resolve():
                return self._resolved(step)
            case Unary() | Collect():
                return self._call(step)
            case Tell():
                return self._tell(step)
            case Wait(delay_s):
                return time.sleep(delay_s)
            case Leave():
                self._names.refresh(JUST_NOW_S)
                return self._channels.leave()
            case Load(source):
                content = read_source(source)
                return content, hashlib.sha256(content).digest()
            case _:
                raise TypeError(f"{type(step).__name__} needs a stream")

    def _perform_on(self, stream: "_Stream", step: Step) -> Any:
        match step:
            case OpenBulk(address, timeout_s):
                return stream.open(address, timeout_s)
            case Follow():
                return stream.follow(step)
            case SendBulk(request):
                return stream.send(request)
            case ReceiveBulk(idle_timeout_s):
                return stream.receive(idle_timeout_s)
            case CloseBulk(idle_timeout_s):
                return stream.close(idle_timeout_s)
            case _:
                return self._perform(step)

    def _resolved(self, step: Resolve) -> tuple[Address, ...]:
        self._names.refresh()
        if (wait_s := self._names.patience_s(step.timeout_s)) > 0:
            wait([self._names.look_up], wait_s)
        self._channels.keep(self._names.current)
        return self._names.addresses(step.given)

    def _tell(self, step: Tell) -> None:
        line = self._channels.begin(step.address)
        method = getattr(STUBS[step.service](line.channel), step.method)
        call = method.future(step.request, timeout=step.timeout_s, metadata=self._where.metadata)
        self._told.add(call)  # grpc cancels a call that nobody refers to
        call.add_done_callback(functools.partial(self._told_of, line))

    def _told_of(self, line: Line, call: Any) -> None:
        self._told.discard(call)
        is_fine = call.code() is grpc.StatusCode.OK
        self._channels.end(line, None if is_fine else error_from_rpc(call, line.address))

    def _call(self, step: Unary | Collect) -> Any:
        with call_span(step):
            line = self._channels.begin(step.address)
            failure: SplitsamError | None = None
            try:
                method = getattr(STUBS[step.service](line.channel), step.method)
                answer = method(step.request, timeout=step.timeout_s, metadata=self._where.metadata)
                return list(answer) if isinstance(step, Collect) else answer
            except grpc.RpcError as error:
                failure = error_from_rpc(error, step.address)
                raise failure from error
            finally:
                self._channels.end(line, failure)


class _Stream:
    """An EncodeImages call that grpc feeds from a queue, on a thread of its own, or a call that only answers."""

    def __init__(self, where: Connection, channels: Channels) -> None:
        self._where = where
        self._channels = channels
        self._address = Address("")
        self._line: Line | None = None
        self._failure: SplitsamError | None = None
        self._outbox: SimpleQueue[encoder_pb2.EncodeImagesRequest | None] = SimpleQueue()
        self._call: Any = None

    def open(self, address: Address, timeout_s: float) -> None:
        stub = STUBS["encoder"](self._begin(address).channel)
        self._outbox = SimpleQueue()
        requests = iter(self._outbox.get, None)
        self._call = stub.EncodeImages(requests, timeout=timeout_s, metadata=self._where.metadata)

    def follow(self, step: Follow) -> None:
        stub = STUBS[step.service](self._begin(step.address).channel)
        self._call = getattr(stub, step.method)(step.request, timeout=step.timeout_s, metadata=self._where.metadata)

    def send(self, request: encoder_pb2.EncodeImagesRequest) -> None:
        self._outbox.put(request)

    def receive(self, idle_timeout_s: float) -> Any:
        silent = threading.Event()

        def give_up() -> None:
            silent.set()
            self._call.cancel()

        timer = threading.Timer(idle_timeout_s, give_up)
        timer.daemon = True
        timer.start()
        try:
            return next(self._call, None)
        except grpc.RpcError as error:
            if silent.is_set():
                raise idle_error(self._address, idle_timeout_s) from error
            self._failure = error_from_rpc(error, self._address)
            raise self._failure from error
        finally:
            timer.cancel()

    def close(self, idle_timeout_s: float) -> None:
        self._outbox.put(None)
        while self.receive(idle_timeout_s) is not None:
            pass

    def abandon(self) -> None:
        """End the call, if one is open, without waiting for anything."""
        self._outbox.put(None)
        if self._call is not None:
            self._call.cancel()
        if self._line is not None:
            self._channels.end(self._line, self._failure)
        self._line = self._failure = None

    def _begin(self, address: Address) -> Line:
        self.abandon()
        self._address = address
        self._line = self._channels.begin(address)
        return self._line


def idle_error(address: Address, idle_timeout_s: float) -> SplitsamError:
    """The server owes an answer and was silent for too long."""
    return SplitsamError(
        f"{address}: no answer on the stream for {idle_timeout_s:g} s",
        code=grpc.StatusCode.DEADLINE_EXCEEDED,
        reason="DEADLINE_EXCEEDED",
    )
