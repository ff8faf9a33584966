"""Records: what was written is read, and whatever else is there is a BadRecord and nothing worse."""

import contextlib
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitsam.common.codecs import CODECS, FP16, Codec
from splitsam.common.keys import Address
from splitsam.common.records import (
    EMBEDDING,
    HEADER_BYTES,
    LOGITS,
    SHAPES,
    BadRecord,
    RecordHeader,
    Size,
    pack_record,
    parse_key,
    unpack_header,
    unpack_record,
)

ADDRESS = Address(b"T" * 16, b"K" * 32)


def header(kind: bytes = LOGITS, codec: Codec = FP16) -> RecordHeader:
    return RecordHeader(
        kind=kind,
        address=ADDRESS,
        model_id="0f" * 32,
        codec=codec,
        shape=SHAPES[kind],
        image_size=Size(4000, 3000),
        input_size=Size(1024, 768),
        orientation=6,
    )


def values(kind: bytes = LOGITS) -> torch.Tensor:
    return torch.randn(SHAPES[kind], generator=torch.Generator().manual_seed(3)) * 10


RECORD = pack_record(header(), values())


@pytest.mark.parametrize("kind", [EMBEDDING, LOGITS])
@pytest.mark.parametrize("codec", CODECS.values(), ids=list(CODECS))
def test_a_record_round_trips(kind: bytes, codec: Codec):
    data = pack_record(header(kind, codec), values(kind))
    read, numbers = unpack_record(data, kind, ADDRESS)
    assert read == header(kind, codec)
    assert numbers.dtype == codec.dtype
    assert torch.equal(numbers, codec.read(bytearray(codec.write(values(kind))), SHAPES[kind]))
    assert len(data) == HEADER_BYTES + read.payload_bytes


def test_a_header_is_read_without_its_payload():
    assert unpack_header(RECORD[:HEADER_BYTES], LOGITS, ADDRESS, len(RECORD)) == header()


def test_a_header_alone_is_refused_when_the_stored_length_is_wrong():
    for size_bytes in (0, HEADER_BYTES, len(RECORD) - 1, len(RECORD) + 1):
        with pytest.raises(BadRecord, match="belong"):
            unpack_header(RECORD[:HEADER_BYTES], LOGITS, ADDRESS, size_bytes)


def test_values_of_another_shape_are_refused_when_packing():
    with pytest.raises(ValueError, match="cannot hold"):
        pack_record(header(), values()[:, :-1])


@pytest.mark.parametrize(
    ("kind", "address"),
    [
        (EMBEDDING, ADDRESS),
        (LOGITS, dataclasses.replace(ADDRESS, tenant_tag=b"t" * 16)),
        (LOGITS, dataclasses.replace(ADDRESS, key=b"k" * 32)),
    ],
    ids=["kind", "tenant", "key"],
)
def test_a_record_of_another_kind_tenant_or_key_is_refused(kind: bytes, address: Address):
    with pytest.raises(BadRecord):
        unpack_record(RECORD, kind, address)


@pytest.mark.parametrize(
    "forged",
    [
        {"orientation": 9},
        {"orientation": 255},
        {"image_size": Size(0, 3000)},
        {"image_size": Size(4000, 0)},
        {"input_size": Size(0, 768)},
        {"input_size": Size(1025, 768)},
    ],
    ids=str,
)
def test_a_header_of_no_image_is_refused_though_its_checksum_is_right(forged: dict):
    data = pack_record(dataclasses.replace(header(), **forged), values())
    with pytest.raises(BadRecord, match="no image is"):
        unpack_record(data, LOGITS, ADDRESS)


@settings(max_examples=300)
@given(st.integers(0, 8 * HEADER_BYTES - 1))
def test_a_flipped_bit_in_the_header_is_refused(bit: int):
    with pytest.raises(BadRecord):
        unpack_record(flipped(bit), LOGITS, ADDRESS)
    with pytest.raises(BadRecord):
        unpack_header(flipped(bit)[:HEADER_BYTES], LOGITS, ADDRESS, len(RECORD))


@settings(max_examples=50)
@given(st.integers(8 * HEADER_BYTES, 8 * len(RECORD) - 1))
def test_a_flipped_bit_in_the_payload_is_refused(bit: int):
    with pytest.raises(BadRecord, match="payload"):
        unpack_record(flipped(bit), LOGITS, ADDRESS)


@settings(max_examples=50)
@given(st.integers(0, len(RECORD) - 1))
def test_a_truncated_record_is_refused(length: int):
    with pytest.raises(BadRecord):
        unpack_record(RECORD[:length], LOGITS, ADDRESS)


def test_a_record_with_bytes_behind_it_is_refused():
    with pytest.raises(BadRecord):
        unpack_record(RECORD + b"\0", LOGITS, ADDRESS)


@settings(max_examples=200)
@given(st.binary(max_size=3 * HEADER_BYTES), st.booleans())
def test_random_bytes_are_refused(data: bytes, as_continuation: bool):
    garbage = RECORD[:4] + data if as_continuation else data
    with pytest.raises(BadRecord):
        unpack_record(garbage, LOGITS, ADDRESS)
    with pytest.raises(BadRecord):
        unpack_header(garbage, LOGITS, ADDRESS, len(garbage))


@given(st.text(max_size=70) | st.text("0123456789abcdefABCDEF", min_size=62, max_size=66))
def test_a_key_is_read_only_from_64_lower_case_hex_digits(text: str):
    with contextlib.suppress(ValueError):
        if bytes.fromhex(text).hex() == text and len(text) == 64:
            assert parse_key(text) == bytes.fromhex(text)
            return
    assert parse_key(text) is None


def test_a_written_key_is_read_back():
    assert parse_key(ADDRESS.key.hex()) == ADDRESS.key
    assert parse_key(ADDRESS.key.hex().upper()) is None


def flipped(bit: int) -> bytes:
    damaged = bytearray(RECORD)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)
