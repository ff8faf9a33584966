"""Encoding many images over one EncodeImages stream, step by step, without doing any I/O itself (see `steps`)."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from splitsam.client import answers
from splitsam.client.errors import SplitsamError, error_from_item, stream_broken, stream_ended, too_large
from splitsam.client.names import Address
from splitsam.client.results import BulkResult, EncodedImage, ImageSource
from splitsam.client.retry import PATIENT, RetryPolicy
from splitsam.client.steps import CloseBulk, Emit, Load, OpenBulk, Operation, ReceiveBulk, SendBulk, Wait
from splitsam.v1 import encoder_pb2


@dataclass
class _Sent:
    source: ImageSource
    sha256: bytes
    request: encoder_pb2.EncodeImagesRequest
    attempts: int = 1


@dataclass
class BulkEncode:
    """One pass over many images, at most `in_flight` of them sent and unanswered; those that are stored are not sent.

    When the server asks to come again, for an image or for the whole stream, the pass pauses for that long and has
    half as many under way from then on: a queue that is full for one image is full for the next. Answers win the
    room back, one image for as many answers as are under way.

    Args:
        sources: taken one by one, as room comes.
        in_flight: images sent and unanswered at any time, at most.
        idle_timeout_s: longest silence of the server while it owes an answer.
        stream_timeout_s: deadline of a stream.
        look_up: a call that returns what is stored of an image, by its SHA-256, or None.
        probe: a call that returns an encoder that is ready, and its limits; made before a stream is opened, because a
            stream that a server refuses while it is written to may not learn of the wait asked for.
        retry: how often a stream is opened that never answered.
        replicas: encoders that the probe chooses from.
    """

    sources: Iterable[ImageSource]
    in_flight: int
    idle_timeout_s: float
    stream_timeout_s: float
    look_up: Callable[[bytes], Operation[encoder_pb2.EmbeddingInfo | None]]
    probe: Callable[[], Operation[tuple[Address, encoder_pb2.EncoderServiceGetModelInfoResponse]]]
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    replicas: int = 1

    def __post_init__(self) -> None:
        self._owed: dict[int, _Sent] = {}
        self._to_send: deque[int] = deque()
        self._max_image_bytes = 0
        self._window = float(self.in_flight)
        self._has_answered = False

    def steps(self) -> Operation[None]:
        """Emit a result for each image, in order of completion.

        Raises:
            SplitsamError: the stream failed, and with it everything that was not emitted yet.
        """
        waiting = enumerate(self.sources)
        is_open = False
        failures = 0
        while True:
            try:
                if not is_open:
                    address, info = yield from self.probe()
                    self._max_image_bytes = info.limits.max_image_bytes
                    yield OpenBulk(address, self.stream_timeout_s)
                    is_open = True
                    self._to_send = deque(self._owed)
                yield from self._fill(waiting)
                if not self._owed:
                    yield CloseBulk(self.idle_timeout_s)
                    return
                response = yield ReceiveBulk(self.idle_timeout_s)
                yield from self._settle(response)
                failures = 0
            except SplitsamError as error:
                failures += 1
                wait_s: float | None = 0.0  # the probe finds another replica
                if failures >= self.replicas or not error.is_of_one_replica:
                    retry, replicas = (PATIENT, 2) if self._has_answered else (self.retry, self.replicas)
                    wait_s = retry.wait_s(error, failures, self.stream_timeout_s, replicas=replicas)
                if wait_s is None:
                    raise
                is_open = False
                yield Wait(wait_s)

    def _fill(self, waiting: Iterator[tuple[int, ImageSource]]) -> Operation[None]:
        """Send what is to be sent again, then new images while there is room."""
        while True:
            while self._to_send:
                yield SendBulk(self._owed[self._to_send.popleft()].request)
            if len(self._owed) >= int(self._window):
                return
            position, source = next(waiting, (-1, b""))
            if position < 0:
                return
            try:
                content, sha256 = yield Load(source)
            except OSError as error:
                yield Emit(BulkResult(position, source, error=error))
                continue
            if 0 < self._max_image_bytes < len(content):  # gRPC's own limit would end the stream
                yield Emit(BulkResult(position, source, error=too_large("image", len(content), self._max_image_bytes)))
                continue
            stored = yield from self.look_up(sha256)
            if stored is not None:
                found = answers.encoded_image(stored, source, sha256, cache_hit=True, stored=True)
                yield Emit(BulkResult(position, source, image=found))
                continue
            request = encoder_pb2.EncodeImagesRequest(request_id=position, image=content)
            self._owed[position] = _Sent(source, sha256, request)
            self._to_send.append(position)

    def _settle(self, response: encoder_pb2.EncodeImagesResponse | None) -> Operation[None]:
        if response is None:
            raise stream_ended(f"the encoder owes {len(self._owed)} answers and ended the stream")
        if response.request_id not in self._owed:
            raise stream_broken(f"the encoder answered an image that was not sent: {response.request_id}")
        self._has_answered = True
        position = response.request_id
        sent = self._owed[position]
        if response.WhichOneof("outcome") == "error":
            error = error_from_item(response.error)
            wait_s = PATIENT.wait_s(error, sent.attempts, self.idle_timeout_s)
            if wait_s is not None:
                sent.attempts += 1
                self._window = max(self._window / 2, 1.0)
                yield Wait(wait_s)
                self._to_send.append(position)
                return
            result = BulkResult(position, sent.source, error=error)
        else:
            result = BulkResult(position, sent.source, image=_encoded(response.result, sent))
            self._window = min(self._window + 1 / self._window, self.in_flight)
        del self._owed[position]
        yield Emit(result)


def _encoded(made: encoder_pb2.EncodeImageResponse, sent: _Sent) -> EncodedImage:
    return answers.encoded_image(
        made.embedding,
        sent.source,
        sent.sha256,
        cache_hit=made.cache_hit,
        stored=made.stored,
        timings=made.timings,
    )
