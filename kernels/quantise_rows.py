"""Rows of activations as 8-bit floats (e4m3) with one scale each, behind a GELU where one comes before.

    y = x, or gelu(x) = x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3))), the tanh form
    scale = max |y| / 448,   quantised = e4m3(y / scale)                     of every row

One program per row keeps it in registers between finding the largest value and dividing by it. Bytes for [M, C] in 16
bits: 3 M C, against 5 M C when the largest value is found in a pass of its own, and 9 M C with GELU in another.
"""

# ruff: noqa: ARG001, N803 (a fake takes all arguments; constexpr names are Triton's)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from .arguments import check_rows, has_no_kernel

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
# Keeps the scale of a row of zeros a number that can be divided by.
SMALLEST_SCALE = 1e-12
# Two reads of 16 bytes a thread: enough of them under way, and few enough registers for every warp of an SM.
_VALUES_PER_WARP = 512


def quantise_rows_reference(x: torch.Tensor, gelu: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantise_rows` in plain PyTorch, computed in float32."""
    values = F.gelu(x.float(), approximate="tanh") if gelu else x.float()
    scales = (values.abs().amax(dim=1, keepdim=True) / LARGEST).clamp(min=SMALLEST_SCALE)
    return (values * (1 / scales)).to(FLOAT8), scales


def to_float8(x: torch.Tensor) -> torch.Tensor:
    """x in e4m3; numbers beyond its range become its largest, as in a kernel, and not NaN."""
    return x.clamp(-LARGEST, LARGEST).to(FLOAT8)


@triton.jit
def store_quantised(values, out, scales, row, columns, real, C: tl.constexpr):
    """A row of float32 values, 0 beyond its end, to its place in out [M, C] and its scale to scales [M]."""
    scale = tl.maximum(tl.max(tl.abs(values), 0) / 448.0, 1e-12)
    tl.store(scales + row, scale)
    tl.store(out + row * C + columns, (values * (1.0 / scale)).to(out.dtype.element_ty), mask=real)


@triton.jit
def _quantise_kernel(x, out, scales, GELU: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """A program per row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    real = columns < C
    values = tl.load(x + row * C + columns, mask=real, other=0.0).to(tl.float32)  # [BLOCK]
    if GELU:
        # -2 sqrt(2 / pi) log2(e), and that times 0.044715
        exponent = values * (-2.3022082 - 0.10294324 * values * values)
        values = values / (1.0 + tl.exp2(exponent))
    store_quantised(values, out, scales, row, columns, real, C)


def row_options(channels: int) -> dict[str, int]:
    """How a program that holds one row is cut up."""
    block = triton.next_power_of_2(channels)
    return {"C": channels, "BLOCK": block, "num_warps": min(16, max(1, block // _VALUES_PER_WARP))}


def launch_quantise_rows(
    x: torch.Tensor, gelu: bool = False, dtype: torch.dtype = FLOAT8
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantise_rows`; with another dtype, the numbers that e4m3 would be made of."""
    check_rows("x", x)
    out, scales = torch.empty_like(x, dtype=dtype), x.new_empty(len(x), 1, dtype=torch.float32)
    _quantise_kernel[(len(x),)](x, out, scales, GELU=gelu, **row_options(x.shape[1]))
    return out, scales


@torch.library.custom_op("splitsam::quantise_rows", mutates_args=())
def quantise_rows(x: torch.Tensor, gelu: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise rows in one kernel; on a CPU, unless interpreted, by `quantise_rows_reference`.

    Args:
        x: [M, C], contiguous; C a multiple of 16.
        gelu: apply it first, in the tanh form.

    Returns:
        [M, C] e4m3 and [M, 1] float32 scales; their product is x, or its GELU, nearly.

    Raises:
        ValueError: for a shape, dtype or stride other than these.
    """
    if has_no_kernel(x.device):
        check_rows("x", x)
        return quantise_rows_reference(x, gelu)
    return launch_quantise_rows(x, gelu)


@quantise_rows.register_fake
def _(x: torch.Tensor, gelu: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x, dtype=FLOAT8), x.new_empty(x.shape[0], 1, dtype=torch.float32)
