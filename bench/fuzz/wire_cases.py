"""Requests for running services: raw bytes, messages, metadata and streams that no client library would make."""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError

from bench.fuzz import images
from bench.fuzz.messages import make_bytes
from bench.fuzz.mutate import mutate
from bench.fuzz.prompts import SEARCH_LIMITS
from splitsam.common.errors import ServiceError
from splitsam.decoder_service.everything_messages import parse_everything
from splitsam.decoder_service.everything_request import count_points
from splitsam.encoder_service.preprocess import ImageLimits, prepare_image
from splitsam.v1 import decoder_pb2, encoder_pb2

KINDS = ("raw bytes", "messages", "metadata", "streams", "frames")
_WEIGHTS = (25, 35, 15, 20, 5)
CLOSE, CANCEL, ABANDON = "close", "cancel", "abandon"
DEADLINE_S = 60.0
# One encode costs a second or more of two cores: so many of the images that can be decoded are sent.
_ENCODED = 0.01
_REAL_KEY = 0.1
_MOST_GRID_POINTS, _MOST_BYTES = 9, 1000
_KEY = re.compile(rb"[0-9a-f]{64}")
_TOKENS = ("", " ", "Bearer", "Bearer ", "Bearer nobody", "bearer  x", "Basic dXNlcjpwYXNz", "Bearer " + "x" * 4000)
_TEXTS = (
    *("", " ", "0", "-1", "x" * 64, "x" * 3000, "~!@#$%^&*()", "a,b;c=d", "%00%ff"),
    *('{"a":1}', "None", "1n", "99999999999S"),
)
_NAMES = (
    *("x-request-id", "traceparent", "tracestate", "x-tenant", "te", "user-agent"),
    *("x-anything", "baggage", "cookie"),
)


@dataclass(frozen=True)
class Method:
    """An RPC of the services.

    Args:
        service: `encoder` or `decoder`.
        path: as HTTP/2 carries it.
        streams: whether it takes or gives a stream.
    """

    service: str
    path: str
    request: Descriptor
    streams: bool


@dataclass(frozen=True)
class Case:
    """A request to be sent.

    Args:
        bodies: the messages; any number on a stream.
        ending: what the caller does after the last: close its side, cancel, or wait in silence and go.
    """

    kind: str
    method: Method
    bodies: tuple[bytes, ...]
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    timeout_s: float = DEADLINE_S
    ending: str = CLOSE


@dataclass(frozen=True)
class Known:
    """What the services know: without it no request would get further than the first check.

    Args:
        key: of an embedding that is there.
        photo: the image that it was made of.
        token: of a caller; None for services without tenants.
    """

    key: str
    photo: bytes
    token: str | None


@functools.cache
def methods() -> tuple[Method, ...]:
    """All of both services."""
    files: Mapping[str, Any] = {"encoder": encoder_pb2.DESCRIPTOR, "decoder": decoder_pb2.DESCRIPTOR}
    return tuple(
        Method(
            name,
            f"/{service.full_name}/{method.name}",
            method.input_type,
            method.client_streaming or method.server_streaming,
        )
        for name, file in files.items()
        for service in file.services_by_name.values()
        for method in service.methods
    )


def make_case(random: Random, known: Known) -> Case:
    """A request from nothing but the randomness given and what the services know."""
    kind = random.choices(KINDS, _WEIGHTS)[0]
    chosen = [method for method in methods() if method.streams or kind != "streams"]
    method = random.choice(chosen)
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    if known.token is not None:
        metadata = (("authorization", f"Bearer {known.token}"),)
    if kind == "metadata":
        metadata = _odd_metadata(random, metadata)
    if kind != "streams":
        body = _raw_body(random, method) if kind == "raw bytes" else _body(random, method, known)
        timeout_s = random.choice((DEADLINE_S, DEADLINE_S, 0.001, 0.02, 10.0**6)) if kind == "metadata" else DEADLINE_S
        return Case(kind, method, (body,), metadata, timeout_s)
    bodies = tuple(_body(random, method, known) for _ in range(random.choice((0, 0, 1, 1, 2, 3, 8))))
    ending = random.choice((CLOSE, CLOSE, CANCEL, ABANDON))
    return Case(kind, method, bodies, metadata, random.choice((DEADLINE_S, 0.05)), ending)


def _raw_body(random: Random, method: Method) -> bytes:
    if random.random() < 0.02:
        return bytes(random.choice((2**20, 33 * 2**20)))
    noise = random.randbytes(random.choice((0, 1, 2, 7, 100, 2000)))
    return random.choice((noise, mutate(random, make_bytes(random, method.request), [noise, b"\xff" * 9])))


def _body(random: Random, method: Method, known: Known) -> bytes:
    """A message as the parsers' targets get them; some of a real image or with a key that is known."""
    if method.service == "encoder" and "image" in method.request.fields_by_name:
        message = message_factory.GetMessageClass(method.request)(image=_image(random, known))
        return message.SerializeToString()
    if method.request.name == "GenerateMasksRequest" and random.random() < _REAL_KEY:
        return _search(random, known).SerializeToString()
    data = make_bytes(random, method.request)
    found = _KEY.search(data)
    if found and random.random() < _REAL_KEY and _is_small(method, data):
        return data[: found.start()] + known.key.encode() + data[found.end() :]
    return data


def _search(random: Random, known: Known) -> decoder_pb2.GenerateMasksRequest:
    """Of an image in place of a key, which the decoder has encoded, and its crops."""
    return decoder_pb2.GenerateMasksRequest(
        image=_image(random, known), points_per_side=random.choice((1, 2)), crop_layers=random.choice((0, 0, 1))
    )


def _image(random: Random, known: Known) -> bytes:
    if random.random() < 0.05:
        return known.photo
    data = images.make(random)
    for _ in range(8):
        if random.random() < _ENCODED or not _is_decoded(data):
            return data
        data = mutate(random, data, images.seeds())
    return b""


def _is_decoded(data: bytes) -> bool:
    try:
        prepare_image(data, ImageLimits())
    except ServiceError:
        return False
    return True


def _is_small(method: Method, data: bytes) -> bool:
    """Whether the model would have little to do, should the key be known."""
    if method.request.name != "GenerateMasksRequest":
        return len(data) < _MOST_BYTES
    try:
        grids = parse_everything(decoder_pb2.GenerateMasksRequest.FromString(data), SEARCH_LIMITS).grids
    except (DecodeError, ServiceError):
        return True
    return count_points(grids) <= _MOST_GRID_POINTS


def _odd_metadata(random: Random, metadata: tuple[tuple[str, str | bytes], ...]) -> tuple[tuple[str, str | bytes], ...]:
    """What gRPC lets a caller send."""
    odd: list[tuple[str, str | bytes]] = list(metadata)
    if random.random() < 0.4:
        odd = [("authorization", random.choice(_TOKENS)) for _ in range(random.choice((0, 1, 1, 2)))]
    for _ in range(random.choice((0, 1, 2, 5, 30))):
        odd.append((random.choice(_NAMES), random.choice(_TEXTS)))
    if random.random() < 0.3:
        odd.append((random.choice(("grpc-status-details-bin", "x-request-id-bin", "a-bin")), random.randbytes(40)))
    return tuple(odd)
