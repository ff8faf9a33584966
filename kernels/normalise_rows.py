"""LayerNorm and quantising of rows to e4m3 as one kernel, with the residual addition before it.

    sum = x + branch,   rounded to the dtype of x, as it goes on to the next addition
    y = (sum - mean(sum)) / sqrt(var(sum) + epsilon) weight + bias,   in float32
    scale = max |y| / 448,   quantised = e4m3(y / scale)                    of every row

One program per row. Bytes for [M, C] in 16 bits: 7 M C, 3 M C without the addition; apart, an addition, a LayerNorm and
a quantisation that finds the largest values first move 6 + 4 + 5 M C.
"""

# ruff: noqa: ARG001, N803 (a fake takes all arguments; constexpr names are Triton's)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from .arguments import check_rows, has_no_kernel
from .quantise_rows import FLOAT8, quantise_rows_reference, row_options, store_quantised


def normalise_rows_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`normalise_rows` in plain PyTorch, computed in float32."""
    return quantise_rows_reference(F.layer_norm(x.float(), x.shape[1:], weight.float(), bias.float(), epsilon))


@triton.jit
def _normalise_kernel(
    x, branch, weight, bias, total, out, scales, epsilon,
    ADD: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program per row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    real = columns < C
    values = tl.load(x + row * C + columns, mask=real, other=0.0).to(tl.float32)  # [BLOCK]
    if ADD:
        values += tl.load(branch + row * C + columns, mask=real, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + row * C + columns, rounded, mask=real)
        values = rounded.to(tl.float32)
    centred = tl.where(real, values - tl.sum(values, 0) / C, 0.0)
    spread = tl.sum(centred * centred, 0) / C
    factors = tl.load(weight + columns, mask=real, other=0.0).to(tl.float32)
    offsets = tl.load(bias + columns, mask=real, other=0.0).to(tl.float32)
    normal = centred * tl.rsqrt(spread + epsilon) * factors + offsets
    store_quantised(normal, out, scales, row, columns, real, C)


def _check(x: torch.Tensor, branch: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor) -> None:
    check_rows("x", x)
    if branch is not None:
        check_rows("branch", branch)
        if branch.shape != x.shape or branch.dtype != x.dtype or branch.device != x.device:
            raise ValueError(
                f"branch must be like x, {list(x.shape)} {x.dtype}, not {list(branch.shape)} {branch.dtype}"
            )
    for name, row in (("weight", weight), ("bias", bias)):
        if row.shape != x.shape[1:] or row.device != x.device or not row.is_contiguous():
            raise ValueError(f"{name} must be [{x.shape[1]}], contiguous and on the device of x, not {list(row.shape)}")


def launch_normalise_rows(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    epsilon: float,
    dtype: torch.dtype = FLOAT8,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`add_normalise_rows`, and without a branch x and what `normalise_rows` gives.

    Args:
        dtype: another one gives the numbers that e4m3 would be made of.
    """
    _check(x, branch, weight, bias)
    total = x if branch is None else torch.empty_like(x)
    out, scales = torch.empty_like(x, dtype=dtype), x.new_empty(len(x), 1, dtype=torch.float32)
    _normalise_kernel[(len(x),)](
        x, branch, weight, bias, total, out, scales, epsilon, ADD=branch is not None, **row_options(x.shape[1])
    )
    return total, out, scales


@torch.library.custom_op("splitsam::normalise_rows", mutates_args=())
def normalise_rows(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm and quantise in one kernel; on a CPU, unless interpreted, by `normalise_rows_reference`.

    Args:
        x: [M, C], contiguous; C a multiple of 16.
        weight, bias: [C], of the LayerNorm, as is epsilon.

    Returns:
        [M, C] e4m3 and [M, 1] float32 scales; their product is the LayerNorm of x, nearly.

    Raises:
        ValueError: for a shape, dtype or stride other than these.
    """
    if has_no_kernel(x.device):
        _check(x, None, weight, bias)
        return normalise_rows_reference(x, weight, bias, epsilon)
    return launch_normalise_rows(x, None, weight, bias, epsilon)[1:]


@normalise_rows.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x, dtype=FLOAT8), x.new_empty(x.shape[0], 1, dtype=torch.float32)


@torch.library.custom_op("splitsam::add_normalise_rows", mutates_args=())
def add_normalise_rows(
    x: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`normalise_rows` of x + branch, and that sum before them: [M, C] in the dtype of x, which branch has too."""
    if has_no_kernel(x.device):
        _check(x, branch, weight, bias)
        total = x + branch
        return total, *normalise_rows_reference(total, weight, bias, epsilon)
    return launch_normalise_rows(x, branch, weight, bias, epsilon)


@add_normalise_rows.register_fake
def _(
    x: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scales = x.new_empty(x.shape[0], 1, dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(x, dtype=FLOAT8), scales
