"""How embeddings are written: what is read again, how far off it is, and that a second writing changes nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitsam.common.codecs import BF16, CODECS, FP16, INT8, Codec

SHAPE = (256, 64, 64)
EVERY_CODEC = pytest.mark.parametrize("codec", CODECS.values(), ids=list(CODECS))


def read_again(codec: Codec, values: torch.Tensor) -> torch.Tensor:
    return codec.read(bytearray(codec.write(values)), values.shape)


def uneven(spread: float = 3.0) -> torch.Tensor:
    """Channels of very different sizes, as an encoder's are."""
    seeded = torch.Generator().manual_seed(4)
    sizes = torch.exp(spread * torch.randn(SHAPE[0], 1, 1, generator=seeded))
    return sizes * torch.randn(SHAPE, generator=seeded)


def test_settings_messages_and_records_tell_codecs_apart():
    assert [(name, codec.name, codec.number) for name, codec in CODECS.items()] == [
        ("fp16", "fp16", 1),
        ("bf16", "bf16", 2),
        ("int8", "int8", 3),
    ]


@EVERY_CODEC
def test_a_payload_is_as_long_as_was_said(codec: Codec):
    assert len(codec.write(uneven())) == codec.payload_bytes(SHAPE)
    assert INT8.payload_bytes(SHAPE) == 2**20 + 1024 == FP16.payload_bytes(SHAPE) // 2 + 1024


@pytest.mark.parametrize("codec", [FP16, BF16])
def test_floats_are_rounded_and_nothing_else(codec: Codec):
    assert torch.equal(read_again(codec, uneven()), uneven().to(codec.dtype))


def test_integers_are_off_by_half_a_step_of_their_channel():
    values = uneven().half().float()
    step = values.abs().amax(dim=(1, 2), keepdim=True) / 127
    off = (read_again(INT8, values).float() - values).abs()
    in_fp16 = values.abs() * 2**-10 + 1e-7
    assert (off <= 0.501 * step + in_fp16).all()
    assert (off.amax(dim=(1, 2)) > 0.4 * step.flatten()).all()


@EVERY_CODEC
def test_what_was_read_is_written_as_it_was(codec: Codec):
    written = codec.write(uneven())
    assert codec.write(codec.read(bytearray(written), SHAPE)) == written


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=6, max_size=6))
def test_any_numbers_are_written_the_same_a_second_time(numbers: list[float]):
    values = torch.tensor(numbers).reshape(2, 1, 3)
    for codec in CODECS.values():
        found = read_again(codec, values)
        assert found.isfinite().all()
        assert codec.write(found) == codec.write(values)


def test_channels_of_zeros_stay_zeros():
    values = uneven()
    values[::2] = 0
    assert not read_again(INT8, values)[::2].any()


@pytest.mark.parametrize("source", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@EVERY_CODEC
def test_finite_values_stay_finite(source: torch.dtype, codec: Codec):
    largest = torch.finfo(source).max
    values = torch.tensor([[[largest]], [[-largest]], [[65504.0]], [[-1.5]], [[0.0]]], dtype=source)
    read = read_again(codec, values).flatten()
    assert read.isfinite().all()
    assert read[0] == -read[1] == min(largest, torch.finfo(codec.dtype).max)
    assert torch.equal(read[3:], values.flatten()[3:].to(codec.dtype))


@EVERY_CODEC
def test_values_that_are_not_contiguous_are_written_in_c_order(codec: Codec):
    turned = uneven().transpose(1, 2)
    assert codec.write(turned) == codec.write(turned.contiguous())
