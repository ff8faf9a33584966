"""Sends the requests of a schedule and writes down what became of each."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import grpc.aio

from bench.calls import make_different, open_channel, read_stages
from bench.load.annotators import Event, Habits, Kind, plan_day
from bench.load.streams import ClickStream
from splitsam.client.connection import rendezvous
from splitsam.client.errors import SplitsamError, error_from_rpc
from splitsam.client.names import Address
from splitsam.v1 import decoder_pb2, decoder_pb2_grpc, encoder_pb2, encoder_pb2_grpc

OK = "OK"
# As the client library's own.
DEADLINE_S: dict[Kind, float] = {"encode": 60.0, "click": 10.0}
_ANNOTATORS_PER_CHANNEL = 16
_SEARCH_DEADLINE_S = 600.0
# vit_t is far less sure of its masks than the models that the default thresholds were made for.
_EVERYTHING = {"predicted_iou_threshold": 0.4, "stability_score_threshold": 0.3}
_LABELS = (decoder_pb2.POINT_LABEL_FOREGROUND, decoder_pb2.POINT_LABEL_BACKGROUND)


@dataclass(frozen=True)
class Place:
    """Where a crowd works and with what.

    Args:
        encoders: addresses; an annotator stays with one.
        decoders: as well; the key of an image says which one it belongs to.
        image: a JPEG.
        streams: each annotator clicks on a PredictMasksStream that stays open, not with one PredictMasks a click.
    """

    encoders: tuple[str, ...]
    decoders: tuple[str, ...]
    image: bytes
    streams: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of one request.

    Args:
        at_s: when it was due, from the start of the schedule.
        latency_ms: from that moment to the end of the call, so that a late sender hides nothing.
        reason: OK, SUPERSEDED, or why there was no answer.
        retry_s: how long a refused caller is asked to wait; None if it is not.
        stages_ms: of an answer, what the service says of its time, `queue` above all.
        sent_late_ms: how long after `at_s` it was sent.
    """

    kind: Kind
    at_s: float
    latency_ms: float
    reason: str
    retry_s: float | None = None
    stages_ms: Mapping[str, float] = field(default_factory=dict)
    sent_late_ms: float = 0.0


class Crowd:
    """Annotators on a few connections.

    Every image is the given file made different. A click goes to the newest image of its annotator that is encoded.

    Args:
        number: of this crowd among those on the same place, whose images are others.
    """

    def __init__(self, place: Place, number: int = 0):
        self._place = place
        self._number = number
        self._stubs: list[tuple[list[Any], dict[str, Any]]] = []
        self._channels: list[grpc.aio.Channel] = []
        self._streams: dict[tuple[int, str], ClickStream] = {}
        self._first = encoder_pb2.EmbeddingInfo()
        self._newest: dict[int, encoder_pb2.EmbeddingInfo] = {}
        self._tokens: dict[int, tuple[str, str]] = {}
        self._telling: set[asyncio.Task[None]] = set()
        self._sent_images = 0

    async def __aenter__(self) -> Self:
        self._first = (await self._encoder(0).EncodeImage(self._next_image(), timeout=600)).embedding
        return self

    async def __aexit__(self, *_error: object) -> None:
        await asyncio.gather(*self._telling)
        for stream in self._streams.values():
            await stream.close()
        for channel in self._channels:
            await channel.close()

    async def connect(self, annotators: Collection[int]) -> None:
        """Open their connections, and where they click on streams, these: who is at work has them open already."""
        for annotator in annotators:
            for home in self._stub(annotator)[1]:
                if self._place.streams:
                    self._stream(annotator, home)
        await asyncio.gather(*(channel.channel_ready() for channel in self._channels))

    async def run(self, events: Sequence[Event], start_s: float | None = None) -> list[Outcome]:
        """Send each event when it is due, however many are unanswered; all have ended on return.

        Args:
            start_s: of the schedule, in seconds of time.monotonic(); now if None.
        """
        start_s = time.monotonic() if start_s is None else start_s
        tasks = []
        for event in events:
            await asyncio.sleep(max(0.0, start_s + event.at_s - time.monotonic()))
            tasks.append(asyncio.create_task(self._send(event, start_s + event.at_s)))
        return list(await asyncio.gather(*tasks))

    @contextlib.asynccontextmanager
    async def searching(self, at_once: int) -> AsyncIterator[list[float]]:
        """Meanwhile, everything mode on the first image, so many searches at once, one after the other.

        Yields:
            How many seconds each search took that has ended.
        """
        took_s: list[float] = []

        async def search(number: int) -> None:
            request = decoder_pb2.GenerateMasksRequest(embedding_key=self._first.embedding_key, **_EVERYTHING)
            while True:
                start_s = time.monotonic()
                try:
                    decoder = self._stub(number)[1][self._home(self._first)]
                    async for _ in decoder.GenerateMasks(request, timeout=_SEARCH_DEADLINE_S):
                        pass
                    took_s.append(time.monotonic() - start_s)
                except grpc.aio.AioRpcError as problem:
                    await asyncio.sleep(error_from_rpc(problem, "").retry_delay_s or 1.0)

        tasks = [asyncio.create_task(search(_ANNOTATORS_PER_CHANNEL * number)) for number in range(at_once)]
        try:
            yield took_s
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def measure_capacity(self, habits: Habits, seconds: float, at_once: int = 4) -> float:
        """Answers a second when so many annotators do not pause."""
        end_s = time.monotonic() + seconds
        answers = 0

        async def work(days: Iterator[Event]) -> None:
            nonlocal answers
            while (now_s := time.monotonic()) < end_s:
                outcome = await self._send(next(days), now_s)
                answers += outcome.reason == OK
                await asyncio.sleep(min(outcome.retry_s or 0.0, max(0.0, end_s - time.monotonic())))

        start_s = time.monotonic()
        await asyncio.gather(*(work(plan_day(annotator, habits, seed="capacity")) for annotator in range(at_once)))
        return answers / (time.monotonic() - start_s)

    async def _send(self, event: Event, due_s: float) -> Outcome:
        send: Callable[[Event], Any] = self._encode if event.kind == "encode" else self._click
        reason, retry_s, stages_ms = OK, None, dict[str, float]()
        sent_late_ms = (time.monotonic() - due_s) * 1000
        try:
            stages_ms = read_stages(await send(event))
        except (grpc.aio.AioRpcError, SplitsamError) as problem:
            error = problem if isinstance(problem, SplitsamError) else error_from_rpc(problem, "")
            reason, retry_s = error.reason, error.retry_delay_s
        latency_ms = (time.monotonic() - due_s) * 1000
        return Outcome(event.kind, event.at_s, latency_ms, reason, retry_s, stages_ms, sent_late_ms)

    async def _encode(self, event: Event) -> encoder_pb2.EncodeTimings:
        call = self._encoder(event.annotator).EncodeImage(self._next_image(), timeout=DEADLINE_S["encode"])
        answer: encoder_pb2.EncodeImageResponse = await call
        self._newest[event.annotator] = answer.embedding
        telling = asyncio.create_task(self._tell(event, answer.embedding))
        self._telling.add(telling)
        telling.add_done_callback(self._telling.discard)
        return answer.timings

    async def _tell(self, event: Event, image: encoder_pb2.EmbeddingInfo) -> None:
        """Tell the decoder of an image that its clicks are to come, as the client library does."""
        request = decoder_pb2.PrefetchEmbeddingRequest(embedding_key=image.embedding_key)
        with contextlib.suppress(grpc.aio.AioRpcError):  # the first click fetches it then
            await self._stub(event.annotator)[1][self._home(image)].PrefetchEmbedding(
                request, timeout=DEADLINE_S["click"]
            )

    async def _click(self, event: Event) -> decoder_pb2.PredictTimings:
        image = self._newest.get(event.annotator, self._first)
        request = self._build_click(event, image)
        home = self._home(image)
        answer: decoder_pb2.PredictMasksResponse
        if self._place.streams:
            answer = await self._stream(event.annotator, home).click(request, DEADLINE_S["click"])
        else:
            decoder = self._stub(event.annotator)[1][home]
            answer = await decoder.PredictMasks(request, timeout=DEADLINE_S["click"])
        [masks] = answer.images
        self._tokens[event.annotator] = (image.embedding_key, masks.prompts[0].masks[0].refinement_token)
        return answer.timings

    def _build_click(self, event: Event, image: encoder_pb2.EmbeddingInfo) -> decoder_pb2.PredictMasksRequest:
        chance = random.Random(f"{event.annotator} {event.image} {event.click}")
        width, height = image.image_size.width, image.image_size.height
        prompts = [
            decoder_pb2.Prompt(
                points=[
                    decoder_pb2.Point(
                        x=chance.uniform(0, width - 1),
                        y=chance.uniform(0, height - 1),
                        label=_LABELS[0] if number == 0 else chance.choice(_LABELS),
                    )
                    for number in range(event.points)
                ]
            )
            for _ in range(event.prompts)
        ]
        key, token = self._tokens.get(event.annotator, ("", ""))
        if event.click and token and key == image.embedding_key:
            prompts[0].refinement_token = token
        return decoder_pb2.PredictMasksRequest(
            images=[decoder_pb2.ImagePrompts(embedding_key=image.embedding_key, prompts=prompts)],
            output=decoder_pb2.OutputOptions(selection=decoder_pb2.MASK_SELECTION_BEST, refinement_tokens=True),
        )

    def _next_image(self) -> encoder_pb2.EncodeImageRequest:
        self._sent_images += 1
        image = make_different(self._place.image, self._number, self._sent_images)
        return encoder_pb2.EncodeImageRequest(image=image)

    def _home(self, image: encoder_pb2.EmbeddingInfo) -> str:
        return rendezvous([Address(each) for each in self._place.decoders], image.embedding_key)[0].place

    def _stream(self, annotator: int, home: str) -> ClickStream:
        stream = self._streams.get((annotator, home))
        if stream is None:
            stream = self._streams[annotator, home] = ClickStream(self._stub(annotator)[1][home])
        return stream

    def _encoder(self, annotator: int) -> Any:
        encoders = self._stub(annotator)[0]
        return encoders[annotator % len(encoders)]

    def _stub(self, annotator: int) -> tuple[list[Any], dict[str, Any]]:
        number = annotator // _ANNOTATORS_PER_CHANNEL
        while len(self._stubs) <= number:
            encoders = [encoder_pb2_grpc.EncoderServiceStub(self._open(each)) for each in self._place.encoders]
            decoders = {each: decoder_pb2_grpc.DecoderServiceStub(self._open(each)) for each in self._place.decoders}
            self._stubs.append((encoders, decoders))
        return self._stubs[number]

    def _open(self, address: str) -> grpc.aio.Channel:
        self._channels.append(open_channel(address))
        return self._channels[-1]
