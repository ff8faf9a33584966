"""Performs the steps of an operation with `grpc.aio`."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import grpc.aio

from splitsam.client.answers import read_source
from splitsam.client.channels import Line
from splitsam.client.connection import Connection
from splitsam.client.errors import SplitsamError, error_from_rpc, stream_ended
from splitsam.client.names import JUST_NOW_S, Address, Names
from splitsam.client.results import ImageSource
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
from splitsam.client.transport import STUBS, idle_error
from splitsam.common import tracing
from splitsam.v1 import encoder_pb2

_LEFT_S = 3600.0  # for calls on a channel that was left


class AioTransport:
    """The channels of an asyncio client, opened on first use, inside its event loop."""

    def __init__(self, where: Connection) -> None:
        self.where = where
        self._names = Names((*where.encoders, *where.decoders))
        self._lines: dict[Address, Line] = {}
        self._left: set[asyncio.Task[None]] = set()
        self._told: set[Any] = set()

    async def close(self) -> None:
        for closing in self._left:
            closing.cancel()
        await asyncio.gather(*self._left, return_exceptions=True)
        for line in self._lines.values():
            await line.channel.close()

    def end(self, line: Line, error: SplitsamError | None) -> None:
        """A call has ended, with this error if it failed; see `Channels.end`."""
        if line.is_useless_after(error) and self._lines.get(line.address) is line:
            self._replace(line)

    async def resolved(self, given: Sequence[str], timeout_s: float) -> tuple[Address, ...]:
        """See `Resolve`."""
        self._names.refresh()
        if (wait_s := self._names.patience_s(timeout_s)) > 0:
            await asyncio.wait([asyncio.wrap_future(self._names.look_up)], timeout=wait_s)
        for address in self._lines.keys() - self._names.current:
            self._close_after_calls(self._lines.pop(address))
        return self._names.addresses(given)

    def line(self, address: Address) -> Line:
        if address not in self._lines:
            self._lines[address] = Line(address, self.where.open_channel(address, grpc.aio))
        return self._lines[address]

    def stub(self, service: str, address: Address) -> Any:
        return STUBS[service](self.line(address).channel)

    def _leave(self) -> None:
        self._names.refresh(JUST_NOW_S)
        for line in list(self._lines.values()):
            if not line.is_new:
                self._replace(line)

    def _replace(self, line: Line) -> None:
        channel = self.where.open_channel(line.address, grpc.aio, has_own_connection=True)
        self._lines[line.address] = Line(line.address, channel)
        self._close_after_calls(line)

    def _close_after_calls(self, line: Line) -> None:
        closing = asyncio.get_running_loop().create_task(line.channel.close(_LEFT_S))
        self._left.add(closing)
        closing.add_done_callback(self._left.discard)

    async def run(self, operation: Operation[T]) -> T:
        """Perform an operation that emits nothing on the way, and return its result."""
        with operation_span(operation) as span, tracing.within(span):
            try:
                step = next(operation)
                while True:
                    step = resume(operation, await self._outcome(step, None))
            except StopIteration as stop:
                result: T = stop.value
                return result

    async def results(self, operation: Operation[None]) -> AsyncIterator[Any]:
        """Perform an operation on a stream and hand out what it emits."""
        stream = _Stream(self)
        with operation_span(operation) as span:
            try:
                step = next(operation)
                while True:
                    if isinstance(step, Emit):
                        yield step.result
                        step = next(operation)
                    else:
                        with tracing.within(span):
                            outcome = await self._outcome(step, stream)
                        step = resume(operation, outcome)
            except StopIteration:
                return
            finally:
                stream.abandon()

    async def _outcome(self, step: Step, stream: "_Stream | None") -> Any:
        try:
            return await (self._perform(step) if stream is None else self._perform_on(stream, step))
        except (SplitsamError, OSError) as error:
            return error

    async def _perform(self, step: Step) -> Any:
        match step:
            case Resolve(given, timeout_s):
                return await self.resolved(given, timeout_s)
            case Unary() | Collect():
                return await self._call(step)
            case Tell():
                return self._tell(step)
            case Wait(delay_s):
                return await asyncio.sleep(delay_s)
            case Leave():
                return self._leave()
            case Load(source):
                return await asyncio.to_thread(_load, source)
            case _:
                raise TypeError(f"{type(step).__name__} needs a stream")

    async def _perform_on(self, stream: "_Stream", step: Step) -> Any:
        match step:
            case OpenBulk(address, timeout_s):
                return stream.open(address, timeout_s)
            case Follow():
                return stream.follow(step)
            case SendBulk(request):
                return await stream.send(request)
            case ReceiveBulk(idle_timeout_s):
                return await stream.receive(idle_timeout_s)
            case CloseBulk(idle_timeout_s):
                return await stream.close(idle_timeout_s)
            case _:
                return await self._perform(step)

    def _tell(self, step: Tell) -> None:
        method = getattr(self.stub(step.service, step.address), step.method)
        call = method(step.request, timeout=step.timeout_s, metadata=self.where.metadata)
        self._told.add(call)  # grpc cancels a call that nobody refers to
        call.add_done_callback(self._told.discard)

    async def _call(self, step: Unary | Collect) -> Any:
        with call_span(step):
            line = self.line(step.address)
            method = getattr(STUBS[step.service](line.channel), step.method)
            call = method(step.request, timeout=step.timeout_s, metadata=self.where.metadata)
            failure: SplitsamError | None = None
            try:
                return [message async for message in call] if isinstance(step, Collect) else await call
            except grpc.RpcError as error:
                failure = error_from_rpc(error, step.address)
                raise failure from error
            finally:
                self.end(line, failure)


class _Stream:
    """An EncodeImages call, or a call that only answers."""

    def __init__(self, transport: AioTransport) -> None:
        self._transport = transport
        self._line: Any = None
        self._call: Any = None

    def open(self, address: Address, timeout_s: float) -> None:
        stub = STUBS["encoder"](self._begin(address))
        self._call = stub.EncodeImages(timeout=timeout_s, metadata=self._transport.where.metadata)

    def follow(self, step: Follow) -> None:
        method = getattr(STUBS[step.service](self._begin(step.address)), step.method)
        self._call = method(step.request, timeout=step.timeout_s, metadata=self._transport.where.metadata)

    def _begin(self, address: Address) -> Any:
        self.abandon()
        self._line = self._transport.line(address)
        return self._line.channel

    async def send(self, request: encoder_pb2.EncodeImagesRequest) -> None:
        try:
            await self._call.write(request)
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            raise await error_of_call(self._call, self._line.address) from error

    async def receive(self, idle_timeout_s: float) -> Any:
        try:
            response = await asyncio.wait_for(self._call.read(), idle_timeout_s)
        except TimeoutError as error:
            raise idle_error(self._line.address, idle_timeout_s) from error
        except grpc.RpcError as error:
            failure = error_from_rpc(error, self._line.address)
            self._transport.end(self._line, failure)
            raise failure from error
        return None if response is grpc.aio.EOF else response

    async def close(self, idle_timeout_s: float) -> None:
        try:
            await self._call.done_writing()
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            raise await error_of_call(self._call, self._line.address) from error
        while await self.receive(idle_timeout_s) is not None:
            pass

    def abandon(self) -> None:
        """End the call, if one is open, without waiting for anything."""
        if self._call is not None:
            self._call.cancel()


async def error_of_call(call: Any, address: Address) -> SplitsamError:
    """Why a call on which nothing can be written any more has ended.

    When the end meets a write, grpc.aio (1.85) puts an INTERNAL of its own in the place of the server's status, which
    is lost; what the server wanted is then unknown and asking again is safe.
    """
    code, trailing = await call.code(), await call.trailing_metadata()
    if code is grpc.StatusCode.OK:
        return stream_ended(f"{address}: the server ended the stream")
    if code is grpc.StatusCode.INTERNAL and not trailing:
        return SplitsamError(
            f"{address}: the stream ended, and grpc.aio lost the reason",
            code=grpc.StatusCode.UNAVAILABLE,
            reason="STREAM_LOST",
            retry_delay_s=0.0,
        )
    return error_from_rpc(
        grpc.aio.AioRpcError(code, await call.initial_metadata(), trailing, await call.details()), address
    )


def _load(source: ImageSource) -> tuple[bytes, bytes]:
    content = read_source(source)
    return content, hashlib.sha256(content).digest()
