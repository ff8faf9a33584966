"""One user's pointer over an image: only the newest position matters."""

import asyncio
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from splitsam.client.aio_transport import AioTransport, error_of_call
from splitsam.client.answers import pointer_answer
from splitsam.client.connection import rendezvous
from splitsam.client.errors import error_from_rpc
from splitsam.client.names import Address
from splitsam.client.prompts import Image, MaskInput, OutputOptions, Prompt, key_of, output_message, predict_request
from splitsam.client.results import PointerAnswer
from splitsam.v1 import decoder_pb2


class Pointer:
    """A PredictMasksStream, open in an `async with`: send positions as they come, iterate over the answers.

    A position that a newer one overtook before it was served is answered with `superseded_by`. A position that fails
    is answered with `error`, and the stream goes on; nothing is encoded again or replayed here.

    Args:
        transport: of the client this pointer belongs to.
        image: what is under the pointer.
        options: what to answer with.
        timeout_s: deadline of the whole stream.
    """

    def __init__(self, transport: AioTransport, image: Image, options: OutputOptions, timeout_s: float) -> None:
        self._transport = transport
        self._address = Address("")
        self._image = image
        self._output = output_message(options)
        self._timeout_s = timeout_s
        self._call: Any = None
        self._request_id = 0

    async def send(
        self, *, points: Any = (), labels: Any = None, box: Any = None, mask_input: MaskInput | None = None
    ) -> int:
        """Send a position (see `Prompt`) and return the request id that its answer will carry."""
        self._request_id += 1
        prompt = Prompt(points, labels, box, mask_input)
        request = predict_request([(self._image, [prompt])], self._output)
        try:
            await self._call.write(decoder_pb2.PredictMasksStreamRequest(request_id=self._request_id, request=request))
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            raise await error_of_call(self._call, self._address) from error
        return self._request_id

    async def done(self) -> None:
        """Say that nothing more will be sent; the iteration ends after the last answer."""
        await self._call.done_writing()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> PointerAnswer:
        try:
            response = await self._call.read()
        except grpc.RpcError as error:
            raise error_from_rpc(error, self._address) from error
        if response is grpc.aio.EOF:
            raise StopAsyncIteration
        return pointer_answer(response)

    async def __aenter__(self) -> Self:
        where = self._transport.where
        decoders = await self._transport.resolved(where.decoders, self._timeout_s)
        self._address = rendezvous(decoders, key_of(self._image))[0]
        stub = self._transport.stub("decoder", self._address)
        self._call = stub.PredictMasksStream(timeout=self._timeout_s, metadata=where.metadata)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._call.cancel()
