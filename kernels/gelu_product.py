"""A linear layer on 8-bit floats (e4m3) and the GELU behind it, rounded to e4m3 with one scale for all rows.

    h[m, n] = row_scales[m] weight_scales[n] sum_k rows[m, k] weight[n, k] + bias[n],   sums in float32
    out = e4m3(gelu(h) / out_scale),   gelu(h) = h (1 + tanh(sqrt(2 / pi) (h + 0.044715 h^3))) / 2

A scale that bounds every output is known before any, from weights and the LayerNorm before them, so no pass over rows
looks for their largest number: of [M, K] and [N, K] to [M, N] go M K + N K + M N bytes, where such a pass moves
4 M N more. e4m3 is a floating format: a bound that is 2^7 too large still leaves its normal numbers 7 binades.
"""

# ruff: noqa: ARG001 (a fake takes all arguments)

import torch
from torch.nn import functional as F

from .gelu_product_hopper import BLOCK_N, launch_hopper_product
from .quantise_rows import FLOAT8, to_float8

OUTPUTS = BLOCK_N.value  # a layer's are a multiple of it


def has_gelu_product(weight: torch.Tensor) -> bool:
    """Whether `gelu_product` takes a layer: the kernel is for Hopper, and a CPU needs none."""
    on_hopper = weight.device.type == "cuda" and torch.cuda.get_device_capability(weight.device) == (9, 0)
    return len(weight) % OUTPUTS == 0 and (on_hopper or weight.device.type == "cpu")


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
    return to_float8(F.gelu(h, approximate="tanh") / out_scale), out_scale.expand(len(rows), 1).contiguous()


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
    if 0 in (m, n, k) or k % 16 or n % OUTPUTS:
        wanted = f"K must be a multiple of 16, N of {OUTPUTS}, and nothing empty"
        raise ValueError(f"{wanted}, not [{m}, {k}] and [{n}, {k}]")
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


@torch.library.custom_op("splitsam::gelu_product", mutates_args=())
def gelu_product(
    rows: torch.Tensor,
    row_scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor,
    out_scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiply, apply GELU and quantise in one kernel, where `has_gelu_product`; on a CPU `gelu_product_reference`.

    Args:
        rows: [M, K] e4m3; row_scales: [M, 1] float32.
        weight: [N, K] e4m3, N a multiple of 256; weight_scales: [1, N] float32.
        bias: [N].
        out_scale: [1] float32; what is beyond 448 times it is cut off.

    Returns:
        [M, N] e4m3 and [M, 1] float32 scales, each `out_scale`; their product is the GELU, nearly.

    Raises:
        ValueError: for a shape, dtype or stride other than these.
    """
    arguments = (rows, row_scales, weight, weight_scales, bias, out_scale)
    _check(*arguments)
    on_cpu = rows.device.type == "cpu"
    return gelu_product_reference(*arguments) if on_cpu else launch_hopper_product(*arguments)


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
