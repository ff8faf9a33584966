"""Clients in a closed loop: each sends an image that no service has seen as soon as the last one is answered."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc.aio

from bench.calls import make_different, open_channel, read_stages
from bench.encode.rows import NOT_STORED
from bench.load.crowd import DEADLINE_S, OK, Outcome
from bench.spread import check_in_time
from splitsam.client.errors import error_from_rpc
from splitsam.v1 import encoder_pb2, encoder_pb2_grpc


@dataclass(frozen=True)
class Crew:
    """The clients of one process.

    Args:
        encoders: host:port of each; the clients take turns among them.
        image: a JPEG.
        clients: each on a connection of its own.
        seconds: that they send for, from the common start on; what is unanswered then is given up.
    """

    encoders: tuple[str, ...]
    image: bytes
    clients: int
    seconds: float


def send_images(number: int, crew: Crew, start_s: float) -> list[Outcome]:
    """Send images: from now on, to warm up, and then for the crew's seconds from `start_s` on.

    Args:
        number: of the process among those that send at one time.
        start_s: in seconds of time.monotonic(); outcomes are dated from there, negative before it.

    Raises:
        RuntimeError: the process was too late, a call failed or was refused without a time to come again, or an
            image was in the cache already.
    """
    return asyncio.run(_send_all(number, crew, start_s))


async def _send_all(number: int, crew: Crew, start_s: float) -> list[Outcome]:
    outcomes: list[Outcome] = []
    async with contextlib.AsyncExitStack() as stack:
        images = (make_different(crew.image, number, count) for count in itertools.count())
        clients = []
        for _, encoder in zip(range(crew.clients), itertools.cycle(crew.encoders), strict=False):
            channel = await stack.enter_async_context(open_channel(encoder))
            clients.append(_Client(encoder_pb2_grpc.EncoderServiceStub(channel), images, start_s, outcomes))
        check_in_time(number, start_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(start_s + crew.seconds - time.monotonic()):
                await asyncio.gather(*(client.run() for client in clients))
    return outcomes


class _Client:
    """One client; takes images from those of its process, and adds what becomes of its calls to `outcomes`."""

    def __init__(self, stub: Any, images: Iterator[bytes], start_s: float, outcomes: list[Outcome]) -> None:
        self._stub, self._images, self._start_s, self._outcomes = stub, images, start_s, outcomes

    async def run(self) -> None:
        for image in self._images:
            request = encoder_pb2.EncodeImageRequest(image=image)
            sent_s = time.monotonic()
            retry_s = await self._try(request, sent_s)
            while retry_s is not None:
                await asyncio.sleep(retry_s)
                retry_s = await self._try(request, sent_s)

    async def _try(self, request: encoder_pb2.EncodeImageRequest, sent_s: float) -> float | None:
        """None when there is an answer, else how many seconds to wait before the next try."""
        try:
            answer = await self._stub.EncodeImage(request, timeout=DEADLINE_S["encode"])
        except grpc.aio.AioRpcError as problem:
            error = error_from_rpc(problem, "the encoder")
            if error.retry_delay_s is None:
                raise RuntimeError(f"a call failed: {error}") from None  # unlike error, it can leave its process
            self._add(sent_s, error.reason, {})
            return error.retry_delay_s
        if answer.cache_hit:
            raise RuntimeError("an image was in the cache already: its time says nothing")
        self._add(sent_s, OK if answer.stored else NOT_STORED, read_stages(answer.timings))
        return None

    def _add(self, sent_s: float, reason: str, stages_ms: dict[str, float]) -> None:
        latency_ms = 1000 * (time.monotonic() - sent_s)
        self._outcomes.append(Outcome("encode", sent_s - self._start_s, latency_ms, reason, stages_ms=stages_ms))
