"""A linear layer on 8-bit floats (e4m3) and the GELU behind it, rounded to e4m3 with one scale for all rows.

    h[m, n] = row_scales[m] weight_scales[n] sum_k rows[m, k] weight[n, k] + bias[n],   sums in float32
    out = e4m3(gelu(h) / out_scale),   gelu(h) = h (1 + tanh(sqrt(2 / pi) (h + 0.044715 h^3))) / 2

A scale that bounds every output is known before any, from weights and the LayerNorm before them, so no pass over rows
looks for their largest number: of [M, K] and [N, K] to [M, N] go M K + N K + M N bytes, where such a pass moves
4 M N more. e4m3 is a floating format: a bound that is 2^7 too large still leaves its normal numbers 7 binades.

A program stays on its multiprocessor and goes over tiles of the output. Those that run at the same time share rows and
weights in the second-level cache: GROUP tiles of rows with every tile of columns, one group after the other.
"""

# ruff: noqa: ARG001, N803 (a fake takes all arguments; constexpr names are Triton's)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from . import gelu_product_hopper as hopper
from .arguments import has_no_kernel
from .quantise_rows import FLOAT8, LARGEST

_GROUP = 8  # tiles of rows


@dataclass(frozen=True)
class ProductTile:
    """How the kernel cuts up its work.

    Args:
        programs: at once on a multiprocessor.
        parts: that a finished tile is stored in, 1 or 2.
        flatten: tiles and their steps are one loop, whose copies go on while a tile is finished.
    """

    block_m: int = 128
    block_n: int = 256
    block_k: int = 128
    num_warps: int = 8
    num_stages: int = 3
    programs: int = 1
    parts: int = 2
    flatten: bool = True


HOPPER_TILE = ProductTile()


def has_gelu_product(weight: torch.Tensor) -> bool:
    """Whether `gelu_product` is for this layer's device and outputs: its kernel is for Hopper, a CPU needs none."""
    on_hopper = weight.device.type == "cuda" and torch.cuda.get_device_capability(weight.device) == (9, 0)
    return weight.device.type == "cpu" or (on_hopper and len(weight) % hopper.BLOCK_N == 0)


def gelu_product_reference(
    rows: torch.Tensor,
    row_scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor,
    out_scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gelu_product` in plain PyTorch, computed in float32."""
    h = (rows.float() * row_scales) @ (weight.float() * weight_scales.t()).t() + bias.float()
    out = F.gelu(h, approximate="tanh") / out_scale
    return out.clamp(-LARGEST, LARGEST).to(FLOAT8), out_scale.expand(len(rows), 1).contiguous()


@triton.jit
def _finish(
    acc, out, left, weight_scales, bias, per_half, m0, n0, N,
    WIDTH: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    """Scales [BLOCK_M, WIDTH] sums and stores their GELU; `left`, their rows' scales, makes them half of that."""
    n = tl.arange(0, WIDTH)
    right = tl.load(weight_scales + n0 + n, mask=n < N - n0, other=0.0)
    offsets = tl.load(bias + n0 + n, mask=n < N - n0, other=0.0).to(tl.float32) * per_half
    half = acc * left[:, None] * right[None, :] + offsets[None, :]
    linear = 0.7978845608 / per_half
    cubic = 0.0356774081 / (per_half * per_half * per_half)
    inner = half * (linear + cubic * (half * half))
    if TANH:
        t = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [inner], tl.float32, is_pure=True, pack=1)
    else:  # what the interpreter has
        t = 2 / (1 + tl.exp(-2 * inner)) - 1
    out.store([m0, n0], (half + half * t).to(out.dtype))


@triton.jit
def _gelu_product_kernel(
    rows, weight, out, row_scales, weight_scales, bias, out_scale, scales, M, N,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, PARTS: tl.constexpr, FLATTEN: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    """A program for every tile that is computed at the same time; `rows`, `weight` and `out` are descriptors."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    scale = tl.load(out_scale)
    per_half = 0.5 / scale
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        first_m = tile // (GROUP * tiles_n) * GROUP
        group = tl.minimum(tiles_m - first_m, GROUP)
        m0 = (first_m + tile % (GROUP * tiles_n) % group) * BLOCK_M
        n0 = tile % (GROUP * tiles_n) // group * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in tl.range(0, K, BLOCK_K):
            a = rows.load([m0, k])  # [BLOCK_M, BLOCK_K]
            b = weight.load([n0, k])  # [BLOCK_N, BLOCK_K]
            acc = tl.dot(a, b.T, acc)
        m = m0 + tl.arange(0, BLOCK_M)
        left = tl.load(row_scales + m, mask=m < M, other=0.0) * per_half
        if PARTS == 2:
            acc = tl.permute(tl.reshape(acc, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1])
            acc0, acc1 = tl.split(acc)
            _finish(acc0, out, left, weight_scales, bias, per_half, m0, n0, N, BLOCK_N // 2, TANH)
            n1 = n0 + BLOCK_N // 2
            _finish(acc1, out, left, weight_scales, bias, per_half, m0, n1, N, BLOCK_N // 2, TANH)
        else:
            _finish(acc, out, left, weight_scales, bias, per_half, m0, n0, N, BLOCK_N, TANH)
        tl.store(scales + m, tl.zeros([BLOCK_M], tl.float32) + scale, mask=(m < M) & (n0 == 0))


def _check(
    rows: torch.Tensor,
    row_scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor,
    out_scale: torch.Tensor,
) -> None:
    if rows.ndim != 2 or weight.ndim != 2 or rows.shape[1] != weight.shape[1]:
        raise ValueError(f"rows and weight must be [M, K] and [N, K], not {list(rows.shape)} and {list(weight.shape)}")
    (m, k), n = rows.shape, len(weight)
    if 0 in (m, n, k) or k % 16 or n % 16:
        raise ValueError(f"K and N must be multiples of 16, and nothing empty, not [{m}, {k}] and [{n}, {k}]")
    for name, values, shape, dtype in (
        ("rows", rows, (m, k), FLOAT8),
        ("row_scales", row_scales, (m, 1), torch.float32),
        ("weight", weight, (n, k), FLOAT8),
        ("weight_scales", weight_scales, (1, n), torch.float32),
        ("bias", bias, (n,), bias.dtype),
        ("out_scale", out_scale, (1,), torch.float32),
    ):
        if values.shape != shape or values.dtype != dtype or values.device != rows.device:
            found = f"{list(values.shape)} {values.dtype} on {values.device}"
            raise ValueError(f"{name} must be {list(shape)} {dtype} on {rows.device}, not {found}")
        if not values.is_contiguous() or (values.dtype == FLOAT8 and values.data_ptr() % 16):
            raise ValueError(f"{name} must be contiguous, 8-bit floats from a multiple of 16 bytes on")


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def launch_gelu_product(
    rows: torch.Tensor,
    row_scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor,
    out_scale: torch.Tensor,
    tile: ProductTile = HOPPER_TILE,
    dtype: torch.dtype = FLOAT8,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gelu_product` of arguments that have been checked; with another dtype, what e4m3 would be made of."""
    (m, k), n = rows.shape, len(weight)
    out, scales = rows.new_empty(m, n, dtype=dtype), torch.empty_like(row_scales)
    tiles = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)
    _gelu_product_kernel[(min(tiles, _multiprocessors(rows.device) * tile.programs),)](
        TensorDescriptor.from_tensor(rows, [tile.block_m, tile.block_k]),
        TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k]),
        TensorDescriptor.from_tensor(out, [tile.block_m, tile.block_n // tile.parts]),
        row_scales, weight_scales, bias, out_scale, scales, m, n,
        K=k, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        GROUP=_GROUP, PARTS=tile.parts, FLATTEN=tile.flatten, TANH=not triton.knobs.runtime.interpret,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out, scales


@torch.library.custom_op("splitsam::gelu_product", mutates_args=())
def gelu_product(
    rows: torch.Tensor,
    row_scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor,
    out_scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiply, apply GELU and quantise in one kernel; on a CPU, unless interpreted, by `gelu_product_reference`.

    Args:
        rows: [M, K] e4m3; row_scales: [M, 1] float32.
        weight: [N, K] e4m3; weight_scales: [1, N] float32.
        bias: [N].
        out_scale: [1] float32; what is beyond 448 times it is cut off.

    Returns:
        [M, N] e4m3 and [M, 1] float32 scales, each `out_scale`; their product is the GELU, nearly.

    Raises:
        ValueError: for a shape, dtype or stride other than these.
    """
    arguments = (rows, row_scales, weight, weight_scales, bias, out_scale)
    _check(*arguments)
    if has_no_kernel(rows.device):
        return gelu_product_reference(*arguments)
    if weight.shape[0] % hopper.BLOCK_N or triton.knobs.runtime.interpret:
        return launch_gelu_product(*arguments)
    return hopper.launch_hopper_product(*arguments, _multiprocessors(rows.device))


@gelu_product.register_fake
def _(
    rows: torch.Tensor,
    row_scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor,
    out_scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    return rows.new_empty(len(rows), len(weight)), torch.empty_like(row_scales)
