"""The overlapping attention kernels' programs, step by step on the CPU; test_kernels_compile compiles it."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")

import gluon_on_cpu

from splitsam.kernels.quantise_rows import FLOAT8
from splitsam.kernels.relpos_global import LOG2_E, global_attention_reference


def inputs(batch: int, gh: int, heads: int, d: int) -> list[torch.Tensor]:
    torch.manual_seed(d + gh)
    shapes = ((batch, gh * 64, 3, heads, d), (2 * gh - 1, d), (127, d))
    return [(std * torch.randn(shape)).bfloat16() for shape, std in zip(shapes, (1.0, 0.3, 0.3), strict=True)]


def errors(tensors: list[torch.Tensor], gh: int, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `out` and of PyTorch in bfloat16, against float32."""
    scale = tensors[0].shape[-1] ** -0.5
    expected = global_attention_reference(*[tensor.float() for tensor in tensors], (gh, 64), scale)
    pytorch = global_attention_reference(*tensors, (gh, 64), scale)
    return (out - expected).abs(), (pytorch - expected).abs()


@pytest.mark.parametrize(("batch", "gh", "heads", "d"), [(1, 10, 2, 64), (2, 4, 1, 64), (1, 10, 1, 80), (2, 6, 1, 80)])
def test_every_copy_and_product_is_waited_for(batch, gh, heads, d) -> None:
    tensors = inputs(batch, gh, heads, d)
    out, unsafe = gluon_on_cpu.attention(*tensors, gh, d**-0.5 * LOG2_E)
    kernel, pytorch = errors(tensors, gh, out)
    assert kernel.max() <= 2 * pytorch.max()
    assert not unsafe.any()


@pytest.mark.parametrize("d", [64, 80])
def test_output_is_in_the_dtype_that_it_is_asked_for(d: int) -> None:
    tensors = inputs(1, 4, 2, d)
    exact, _ = gluon_on_cpu.attention(*tensors, 4, d**-0.5 * LOG2_E, torch.float32)
    in_8_bits, _ = gluon_on_cpu.attention(*tensors, 4, d**-0.5 * LOG2_E, FLOAT8)
    assert torch.equal(in_8_bits.float(), exact.to(FLOAT8).float())
    kernel, pytorch = errors(tensors, 4, exact)
    assert kernel.max() <= pytorch.max()


@pytest.mark.parametrize("size", [8, 40])  # sums near 2^90, and beyond float32
@pytest.mark.parametrize(("d", "queries"), [(64, 128), (80, 64)])
def test_tile_misled_by_its_first_keys_is_flagged_and_others_are_right(d: int, queries: int, size: int) -> None:
    tensors = inputs(1, 6, 1, d)
    qkv = tensors[0]
    qkv[0, 300, 1] = size * qkv[0, 5, 0]  # a late key that dwarfs all, for the queries like the fifth
    qkv[0, queries:, 0] = qkv[0, queries:, 0] * 0.05  # the other tiles hardly look at any
    out, unsafe = gluon_on_cpu.attention(*tensors, 6, d**-0.5 * LOG2_E)
    assert unsafe.flatten().tolist() == [1] + [0] * (6 * 64 // queries - 1)
    error, pytorch = errors(tensors, 6, out)
    assert error[:, queries:].max() <= 2 * pytorch[:, queries:].max()


@pytest.mark.parametrize("size", [-400.0, 200.0])  # row terms that exp2 takes to 0, and beyond 2^60
def test_factors_that_leave_the_safe_range_are_flagged(size: float) -> None:
    tensors = inputs(1, 4, 1, 64)
    qkv, rel_pos_h, _ = tensors
    qkv[0, :128, 0, :, 0] = 1.0
    qkv[0, 128:, 0, :, 0] = 0.0
    rel_pos_h[:, 0] = size
    out, unsafe = gluon_on_cpu.attention(*tensors, 4, 64**-0.5 * LOG2_E)
    assert unsafe.flatten().tolist() == [1, 0]
    error, pytorch = errors(tensors, 4, out)
    assert error[:, 128:].max() <= 2 * pytorch[:, 128:].max()


def test_factors_beyond_the_safe_range_are_flagged_though_weights_make_up_for_them() -> None:
    tensors = inputs(1, 4, 1, 64)
    qkv, rel_pos_h, _ = tensors
    qkv[0, :, 0] = 0.0
    qkv[0, :64, 0, :, :2] = 1.0
    qkv[0, 64:, 1, :, 0], qkv[0, 64:, 1, :, 1] = 0.0, -480.0  # of scores 2^-87
    rel_pos_h[:3, 0], rel_pos_h[3:, 0] = 50.0, 0.0  # of factors 2^72, for the first image row of queries
    rel_pos_h[:, 1] = 0.0
    _, unsafe = gluon_on_cpu.attention(*tensors, 4, 64**-0.5 * LOG2_E)
    assert unsafe.flatten().tolist() == [1, 0]
