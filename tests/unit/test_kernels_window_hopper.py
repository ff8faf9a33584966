"""The windowed attention kernel for Hopper, step by step on the CPU, and compiled."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")

import window_on_cpu

from splitsam.kernels.quantise_rows import FLOAT8
from splitsam.kernels.relpos_window import window_attention_reference

# Of heads and slots, then whether a warp copies, terms are early, sums are early, stores are wide.
CASES = [
    (d, stages, (copier, early, early, early))
    for d, stages in ((64, 2), (64, 3), (80, 2))
    for copier in (False, True)
    for early in (False, True)
]


def inputs(batch: int, gh: int, heads: int, d: int) -> list[torch.Tensor]:
    torch.manual_seed(d + gh)
    shapes = ((batch, gh * 64, 3, heads, d), (3, heads, d), (27, d), (27, d))
    return [(std * torch.randn(shape)).bfloat16() for shape, std in zip(shapes, (1.0, 1.0, 0.3, 0.3), strict=True)]


def errors(tensors: list[torch.Tensor], gh: int, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `out` and of PyTorch in bfloat16, against float32."""
    scale = tensors[0].shape[-1] ** -0.5
    expected = window_attention_reference(*[tensor.float() for tensor in tensors], (gh, 64), scale)
    pytorch = window_attention_reference(*tensors, (gh, 64), scale)
    return (out - expected).abs(), (pytorch - expected).abs()


@pytest.mark.parametrize(("d", "stages", "variant"), CASES)
@pytest.mark.parametrize(("batch", "gh", "heads", "programs"), [(1, 22, 1, 3), (2, 22, 2, 7), (1, 8, 1, 99), (1, 14, 1, 1)])
def test_every_copy_and_product_is_waited_for(batch, gh, heads, programs, d, stages, variant) -> None:
    tensors = inputs(batch, gh, heads, d)
    out = window_on_cpu.attention(*tensors, gh, d**-0.5, programs, stages, variant)
    kernel, pytorch = errors(tensors, gh, out)
    assert kernel.max() <= 2 * pytorch.max()
