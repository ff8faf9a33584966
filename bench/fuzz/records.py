"""Records of the cache: whole ones, damaged, cut, exchanged, and forged with the checksums made right again."""

import functools
import hashlib
import zlib
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray

from bench.fuzz.mutate import EXTREME_BYTES, EXTREME_INTS, mutate
from bench.fuzz.target import Broken
from splitsam.client.answers import widen
from splitsam.common.codecs import CODECS, FP16, INT8, Codec
from splitsam.common.keys import Address
from splitsam.common.messages import to_codec
from splitsam.common.records import (
    EMBEDDING,
    HEADER_BYTES,
    LOGITS,
    SHAPES,
    BadRecord,
    RecordHeader,
    Size,
    pack_record,
    unpack_header,
    unpack_record,
)
from splitsam.v1 import types_pb2

ADDRESS = Address(b"T" * 16, b"K" * 32)
_OTHERS = (Address(b"t" * 16, b"K" * 32), Address(b"T" * 16, b"k" * 32))
_CRC_BYTES = 4
_SIZE_BYTES = 8


@functools.cache
def seeds() -> tuple[bytes, ...]:
    """Records of logits: some of the address that is asked for, then some of others; the last is an embedding's."""
    seeded = torch.Generator().manual_seed(5)

    def record(kind: bytes, address: Address, codec: Codec, orientation: int) -> bytes:
        sizes = Size(4000, 3000), Size(1024, 768)
        header = RecordHeader(kind, address, "0f" * 32, codec, SHAPES[kind], *sizes, orientation)
        return pack_record(header, torch.randn(SHAPES[kind], generator=seeded))

    own = [record(LOGITS, ADDRESS, codec, orientation) for codec in CODECS.values() for orientation in (0, 8)]
    return (
        *own,
        *(record(LOGITS, other, FP16, 0) for other in _OTHERS),
        record(EMBEDDING, ADDRESS, INT8, 3),
    )


@functools.cache
def _digests() -> frozenset[bytes]:
    return frozenset(hashlib.sha256(seed).digest() for seed in seeds())


def make(random: Random) -> bytes:
    """A record as it may come back: damaged anywhere, cut, with another's payload, or forged."""
    records = seeds()
    data = random.choice(records[:-1]) if random.random() < 0.98 else records[-1]
    what = random.randrange(8)
    if what < 2:
        return data[: random.choice((0, HEADER_BYTES - 1, HEADER_BYTES, len(data) - 1, random.randrange(len(data))))]
    if what == 2:
        return data[:HEADER_BYTES] + random.choice(records)[HEADER_BYTES:]
    header = mutate(random, data[:HEADER_BYTES], [each[:HEADER_BYTES] for each in records])
    if what == 3:
        return header + data[HEADER_BYTES:]
    if what < 6:
        return _forged(random, data)
    return mutate(random, data, records, longest=3 * 2**20)


def make_header(random: Random) -> bytes:
    """The first bytes of a record and, behind them, the length that Redis reports for all of it."""
    data = random.choice(seeds())
    size_bytes = len(data) if random.random() < 0.8 else random.choice(EXTREME_INTS)
    header = _forged(random, data[:HEADER_BYTES]) if random.random() < 0.5 else data[:HEADER_BYTES]
    if random.random() < 0.5:
        header = mutate(random, header, [each[:HEADER_BYTES] for each in seeds()])
    return header[:HEADER_BYTES] + size_bytes.to_bytes(_SIZE_BYTES, "little")


def check(data: bytes) -> str:
    """`unpack_record`: the numbers that were written, or a BadRecord; nothing else is ever taken for a record."""
    outcomes = {_unpacked(data, kind) for kind in (LOGITS, EMBEDDING)}
    return "record" if "record" in outcomes else outcomes.pop()


def _unpacked(data: bytes, kind: bytes) -> str:
    try:
        header, values = unpack_record(data, kind, ADDRESS)
    except BadRecord as error:
        if not str(error):
            raise Broken("no reason why the record is bad") from error
        return "BadRecord"
    _check_header(header, kind, len(data))
    if tuple(values.shape) != SHAPES[kind] or values.dtype != header.codec.dtype:
        raise Broken(f"values of {tuple(values.shape)}, {values.dtype}")
    if not np.array_equal(values.float().numpy(), _numbers(data[HEADER_BYTES:], header), equal_nan=True):
        raise Broken("other numbers than those that are stored")
    end = HEADER_BYTES - _CRC_BYTES
    is_sound = zlib.crc32(data[:end]) == int.from_bytes(data[end:HEADER_BYTES], "little")
    if not is_sound or zlib.crc32(data[HEADER_BYTES:]) != int.from_bytes(data[end - _CRC_BYTES : end], "little"):
        raise Broken("a checksum is wrong and nobody noticed")
    return "record" if hashlib.sha256(data).digest() in _digests() else "forged record"


def _numbers(payload: bytes, header: RecordHeader) -> NDArray[np.float32]:
    """What a payload says to a client that downloads it, as far as fp16 holds it."""
    codec = types_pb2.EmbeddingCodec.Value(to_codec(header.codec.name))
    with np.errstate(all="ignore"):
        numbers = widen(payload, codec, header.shape)
        return (
            np.clip(numbers, -65504, 65504).astype(np.float16).astype(np.float32) if header.codec is INT8 else numbers
        )


def check_header(data: bytes) -> str:
    """`unpack_header`, as `peek` has it read: a header of the address that was asked for, or a BadRecord."""
    header, size_bytes = data[:-_SIZE_BYTES], int.from_bytes(data[-_SIZE_BYTES:], "little")
    outcome = "BadRecord"
    for kind in (LOGITS, EMBEDDING):
        try:
            _check_header(unpack_header(header, kind, ADDRESS, size_bytes), kind, size_bytes)
        except BadRecord:
            continue
        outcome = "header"
    return outcome


def _check_header(header: RecordHeader, kind: bytes, size_bytes: int) -> None:
    """What the services do with a header must be possible: they write its sizes and orientation into answers."""
    if header.address != ADDRESS or header.kind != kind or header.shape != SHAPES[kind]:
        raise Broken(f"the record of another place: {header}")
    if size_bytes != HEADER_BYTES + header.payload_bytes:
        raise Broken(f"{size_bytes} bytes taken for {header}")
    types_pb2.Orientation.Name(header.orientation)
    for size in (header.image_size, header.input_size):
        if min(size.width, size.height) < 1:
            raise Broken(f"an image without pixels: {header}")


def _forged(random: Random, data: bytes) -> bytes:
    """Fields of the header changed and its checksum made right: no accident, but nothing must fall over it."""
    end = HEADER_BYTES - _CRC_BYTES
    fields = bytearray(data[:end])
    for _ in range(random.choice((1, 1, 2, 5))):
        if random.random() < 0.5:
            fields[random.randrange(end)] = random.choice((*EXTREME_BYTES, random.randrange(256)))
        else:
            place = random.choice(range(end - 36, end, 4))  # shape, sizes, length and checksum of the payload
            fields[place : place + 4] = random.choice(EXTREME_INTS).to_bytes(4, "little")
    return bytes(fields) + zlib.crc32(fields).to_bytes(_CRC_BYTES, "little") + data[HEADER_BYTES:]
