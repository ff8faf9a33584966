"""A small steady load whose right answers are known: encodes and clicks, by the client library and by raw calls."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
from numpy.typing import NDArray

from splitsam.client import Client, SplitsamError
from splitsam.client.connection import channel_options
from splitsam.client.errors import error_from_rpc
from splitsam.client.names import Address
from splitsam.common.rle import decode_rle
from splitsam.v1 import decoder_pb2, decoder_pb2_grpc, encoder_pb2, encoder_pb2_grpc

PHOTOGRAPHS = Path(__file__).parents[2] / "training" / "photographs"
NAMES = ("coffee", "kite", "owl")
PLACES = ((0.5, 0.5), (0.3, 0.6), (0.7, 0.4))  # of width and height
ENCODE_S = 15.0
CLICK_S = 10.0
RAW_S = 10.0
# Whom an answer shares its batch with may turn single pixels of its edge; another mask is far below.
RIGHT_IOU = 0.99
_PAUSE_S = 0.3
_SLACK_S = 0.5  # of a busy machine, before an answer counts as late
Pixels = NDArray[np.bool_]


@dataclass(frozen=True)
class KnownImage:
    """A photograph, where it is clicked on, and the masks of an undisturbed run, [height, width] bool."""

    content: bytes
    points: tuple[tuple[float, float], ...]
    masks: tuple[Pixels, ...] = ()

    def fresh(self, number: int) -> bytes:
        """The same pixels in a file that nobody has encoded yet: a JPEG comment makes it another digest."""
        comment = f"{number} {time.time_ns()}".encode()
        return self.content[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + self.content[2:]


@dataclass(frozen=True)
class Outcome:
    """One operation of the load.

    Args:
        by: `library` or `raw`.
        reason: of its failure, empty when it was answered.
        is_late: it went on after its deadline.
        iou: of its mask with the known one; None when it has none.
        is_normal: answered, and an encode was stored.
    """

    by: str
    end_s: float
    seconds: float
    reason: str
    is_late: bool
    iou: float | None
    is_normal: bool


def learn(encoders: Sequence[str], decoders: Sequence[str]) -> list[KnownImage]:
    """What the deployment answers while nothing disturbs it."""
    known = []
    with Client(encoders, decoders, encode_timeout_s=120, predict_timeout_s=60) as client:
        for name in NAMES:
            content = (PHOTOGRAPHS / f"{name}.jpg").read_bytes()
            image = client.encode(content)
            points = tuple((x * image.width_px, y * image.height_px) for x, y in PLACES)
            masks = tuple(client.predict(image, points=[point])[0].to_array() for point in points)
            known.append(KnownImage(content, points, masks))
    return known


class Load:
    """Callers on threads of their own, from `with` to its end.

    Args:
        library: callers that use the client library over all addresses.
        raw: whether one caller uses the stubs, each replica in turn, without any retry.
    """

    def __init__(
        self,
        known: Sequence[KnownImage],
        encoders: Sequence[str],
        decoders: Sequence[str],
        *,
        library: int = 1,
        raw: bool = True,
    ):
        self._known = known
        self._encoders = list(encoders)
        self._decoders = list(decoders)
        self._stop = threading.Event()
        self._outcomes: list[Outcome] = []
        self._numbers = itertools.count()
        work = [self._use_library] * library + [self._use_stubs] * raw
        self._threads = [threading.Thread(target=each, daemon=True) for each in work]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    @property
    def outcomes(self) -> list[Outcome]:
        return list(self._outcomes)

    def _turns(self) -> Iterator[KnownImage]:
        for image in itertools.cycle(self._known):
            if self._stop.wait(_PAUSE_S):
                return
            yield image

    def _use_library(self) -> None:
        with Client(self._encoders, self._decoders, encode_timeout_s=ENCODE_S, predict_timeout_s=CLICK_S) as client:
            for image in self._turns():
                content = image.fresh(next(self._numbers))
                handle = self._record("library", ENCODE_S, lambda content=content: client.encode(content))
                for point, mask in zip(image.points, image.masks, strict=True):
                    if handle is None:
                        break

                    def click(handle=handle, point=point) -> Pixels:
                        return client.predict(handle, points=[point])[0].to_array()

                    # An embedding that is gone is encoded again in between, each step with its own deadline.
                    self._record("library", 2 * CLICK_S + ENCODE_S, click, mask)

    def _use_stubs(self) -> None:
        channels = {
            each: grpc.insecure_channel(each, channel_options(Address(each)))
            for each in self._encoders + self._decoders
        }
        for turn, image in enumerate(self._turns()):
            encoder = self._encoders[turn % len(self._encoders)]
            decoder = self._decoders[turn % len(self._decoders)]
            made = self._record("raw", RAW_S, lambda: _encode(channels[encoder], image.fresh(next(self._numbers))))  # noqa: B023
            for point, mask in zip(image.points, image.masks, strict=True):
                if made is None:
                    break
                key = made.embedding.embedding_key
                self._record("raw", RAW_S, lambda: _click(channels[decoder], key, point), mask)  # noqa: B023
        for channel in channels.values():
            channel.close()

    def _record(self, by: str, limit_s: float, call: Callable[[], object], mask: Pixels | None = None) -> object:
        """What the call returned, or None when it failed."""
        start_s = time.monotonic()
        reason, answer = "", None
        try:
            answer = call()
        except SplitsamError as error:
            reason = error.reason
        except grpc.RpcError as error:
            reason = error_from_rpc(error, "").reason
        end_s = time.monotonic()
        seconds = end_s - start_s
        iou = _iou(answer, mask) if isinstance(answer, np.ndarray) and mask is not None else None
        is_normal = answer is not None and getattr(answer, "stored", True)
        is_late = seconds > limit_s + _SLACK_S
        self._outcomes.append(Outcome(by, end_s, seconds, reason, is_late, iou, is_normal))
        return answer


def _encode(channel: grpc.Channel, content: bytes) -> object:
    request = encoder_pb2.EncodeImageRequest(image=content)
    return encoder_pb2_grpc.EncoderServiceStub(channel).EncodeImage(request, timeout=RAW_S)


def _click(channel: grpc.Channel, key: str, point: tuple[float, float]) -> Pixels:
    label = decoder_pb2.POINT_LABEL_FOREGROUND
    prompt = decoder_pb2.Prompt(points=[decoder_pb2.Point(x=point[0], y=point[1], label=label)])
    images = [decoder_pb2.ImagePrompts(embedding_key=key, prompts=[prompt])]
    output = decoder_pb2.OutputOptions(formats=[decoder_pb2.MASK_FORMAT_RLE])
    request = decoder_pb2.PredictMasksRequest(images=images, output=output)
    answer = decoder_pb2_grpc.DecoderServiceStub(channel).PredictMasks(request, timeout=RAW_S)
    rle = answer.images[0].prompts[0].masks[0].rle
    return decode_rle(rle.size, rle.counts)


def _iou(first: Pixels, second: Pixels) -> float:
    """1 for two empty masks, 0 for masks of different images."""
    if first.shape != second.shape:
        return 0.0
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else 1.0
