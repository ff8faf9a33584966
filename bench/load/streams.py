"""Clicks of one annotator on one decoder over a single PredictMasksStream, as a labeling tool sends them."""

import asyncio
from typing import Any

import grpc.aio

from splitsam.client.errors import SplitsamError, error_from_item, error_from_rpc, stream_ended
from splitsam.v1 import decoder_pb2

SUPERSEDED = "SUPERSEDED"


class ClickStream:
    """A stream that stays open from click to click.

    Args:
        decoder: stub.
    """

    def __init__(self, decoder: Any):
        self._call = decoder.PredictMasksStream()
        self._waiting: dict[int, asyncio.Future[decoder_pb2.PredictMasksResponse]] = {}
        self._sent = 0
        self._writing = asyncio.Lock()  # gRPC takes one message at a time
        self._reading = asyncio.create_task(self._read())

    async def click(
        self, request: decoder_pb2.PredictMasksRequest, deadline_s: float
    ) -> decoder_pb2.PredictMasksResponse:
        """Send a request and wait for its answer; others may wait for theirs meanwhile.

        Raises:
            SplitsamError: it was refused, a newer one superseded it, no answer came in time, or the stream is over.
        """
        self._sent += 1
        number = self._sent
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(deadline_s):
                async with self._writing:
                    await self._call.write(decoder_pb2.PredictMasksStreamRequest(request_id=number, request=request))
                return await answer
        except TimeoutError:
            late = grpc.StatusCode.DEADLINE_EXCEEDED
            raise SplitsamError(f"no answer in {deadline_s:g} s", code=late, reason=late.name) from None
        except (grpc.RpcError, asyncio.InvalidStateError):
            raise stream_ended("the decoder ended the stream") from None
        finally:
            self._waiting.pop(number, None)

    async def close(self) -> None:
        self._call.cancel()
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    async def _read(self) -> None:
        problem = stream_ended("the decoder ended the stream")
        try:
            async for answer in self._call:
                waiting = self._waiting.get(answer.request_id)
                if waiting is None or waiting.done():
                    continue
                match answer.WhichOneof("outcome"):
                    case "result":
                        waiting.set_result(answer.result)
                    case "superseded":
                        newer = f"click {answer.superseded.by_request_id} came first"
                        error = SplitsamError(newer, code=grpc.StatusCode.ABORTED, reason=SUPERSEDED)
                        waiting.set_exception(error)
                    case _:
                        waiting.set_exception(error_from_item(answer.error))
        except grpc.RpcError as failure:
            problem = error_from_rpc(failure, "")
        finally:
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(problem)
