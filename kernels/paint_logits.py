"""The decoder's upscaling and hypernetwork product as one kernel: pixels in, logits out.

    z[n, s]       = GELU(LayerNorm(W1[s] x[n] + b1))    s: the 2 x 2 pixels that a transposed convolution makes of one
    l[k, n, s, t] = h[k] . GELU(W2[t] z[n, s] + b2)     t: the 2 x 2 of each of those

A program per (row of 64 pixels, prompt) makes 4 rows of 256 logits of it, for the K masks that were asked for. The
upscaled features, 4 MiB a prompt in 16 bits, exist in registers alone.

Per prompt: 4096 x (4 x 256 x 64 + 16 x 64 x 32 + 16 x 32 K) products, 0.8 GFLOP at K = 1; 2 MiB read, 0.25 K written.
GELU is evaluated 3.1 million times.
"""

# ruff: noqa: ARG001, N803 (a fake takes all arguments; constexpr names are Triton's)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from .arguments import DTYPES, check_table, has_no_kernel

SIDE, CHANNELS, INNER, OUTER = 64, 256, 64, 32
MOST_MASKS = 4


def paint_logits_reference(
    pixels: torch.Tensor,
    hyper: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
) -> torch.Tensor:
    """The same in PyTorch; see `paint_logits`."""
    prompts = len(pixels)
    inner = F.linear(pixels, weight1).view(prompts, -1, 4, INNER) + bias1
    inner = F.gelu(F.layer_norm(inner, (INNER,), norm_weight, norm_bias, eps))
    upscaled = F.gelu(F.linear(inner, weight2).view(prompts, -1, 16, OUTER) + bias2)
    blocks = torch.einsum("pnsc,pkc->pnsk", upscaled.float(), hyper).view(prompts, SIDE, SIDE, 2, 2, 2, 2, -1)
    return blocks.permute(0, 7, 1, 3, 5, 2, 4, 6).reshape(prompts, -1, 4 * SIDE, 4 * SIDE)


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _upscale(x, weight1, bias1, norm_weight, norm_bias, eps, PLACE: tl.constexpr, C: tl.constexpr, IN: tl.constexpr):
    """[pixels, IN]: one of the four pixels that the first convolution makes of each."""
    i, c = tl.arange(0, IN), tl.arange(0, C)
    w = tl.load(weight1 + (PLACE * IN + i)[:, None] * C + c[None, :])  # [IN, C]
    y = tl.dot(x, tl.trans(w), input_precision="ieee") + tl.load(bias1 + i).to(tl.float32)[None, :]
    centred = y - (tl.sum(y, 1) / IN)[:, None]
    variance = tl.sum(centred * centred, 1) / IN
    y = centred * (1.0 / tl.sqrt_rn(variance + eps))[:, None]
    y = y * tl.load(norm_weight + i).to(tl.float32)[None, :] + tl.load(norm_bias + i).to(tl.float32)[None, :]
    return _gelu(y).to(x.dtype)


@triton.jit
def _features(z, weight2, bias2, PLACE: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr):
    """[pixels, OUT] float32: one of the four that the second makes of one of those."""
    i, o = tl.arange(0, IN), tl.arange(0, OUT)
    w = tl.load(weight2 + (PLACE * OUT + o)[:, None] * IN + i[None, :])  # [OUT, IN]
    return _gelu(tl.dot(z, tl.trans(w), input_precision="ieee") + tl.load(bias2 + o).to(tl.float32)[None, :])


@triton.jit
def _paint_kernel(
    pixels, hyper, weight1, bias1, norm_weight, norm_bias, weight2, bias2, out,
    eps,
    K: tl.constexpr, S: tl.constexpr, C: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """A program per (row of pixels, prompt)."""
    y, prompt = tl.program_id(0), tl.program_id(1)
    n, c, o = tl.arange(0, S), tl.arange(0, C), tl.arange(0, OUT)
    x = tl.load(pixels + (prompt.to(tl.int64) * S + y) * (S * C) + n[:, None] * C + c[None, :])
    columns = tl.arange(0, 4 * S)
    for sy in tl.static_range(2):
        left = _upscale(x, weight1, bias1, norm_weight, norm_bias, eps, 2 * sy, C, IN)
        right = _upscale(x, weight1, bias1, norm_weight, norm_bias, eps, 2 * sy + 1, C, IN)
        for ty in tl.static_range(2):
            f00 = _features(left, weight2, bias2, 2 * ty, IN, OUT)
            f01 = _features(left, weight2, bias2, 2 * ty + 1, IN, OUT)
            f10 = _features(right, weight2, bias2, 2 * ty, IN, OUT)
            f11 = _features(right, weight2, bias2, 2 * ty + 1, IN, OUT)
            for k in tl.static_range(K):
                h = tl.load(hyper + (prompt * K + k) * OUT + o)[None, :]
                l00, l01 = tl.sum(f00 * h, 1), tl.sum(f01 * h, 1)
                l10, l11 = tl.sum(f10 * h, 1), tl.sum(f11 * h, 1)
                line = tl.reshape(tl.join(tl.join(l00, l10), tl.join(l01, l11)), [4 * S])  # x, then sx, then tx
                row = ((prompt * K + k) * (4 * S) + 4 * y + 2 * sy + ty).to(tl.int64)
                tl.store(out + row * (4 * S) + columns, line)


@torch.library.custom_op("splitsam::paint_logits", mutates_args=())
def paint_logits(
    pixels: torch.Tensor,
    hyper: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
) -> torch.Tensor:
    """Upscale pixels and weigh their channels; on a CPU, unless interpreted, in PyTorch.

    Args:
        pixels: [P, 4096, 256], contiguous.
        hyper: [P, K, 32] float32, contiguous, K at most 4.
        weight1: [4 * 64, 256], bias1: [64], of the first transposed convolution, its four places in turn.
        norm_weight, norm_bias, eps: of the LayerNorm, [64].
        weight2: [4 * 32, 64], bias2: [32], of the second.

    Returns:
        [P, K, 256, 256] float32.

    Raises:
        ValueError: for a shape, dtype or stride other than these.
    """
    if pixels.shape[1:] != (SIDE * SIDE, CHANNELS) or pixels.dtype not in DTYPES or not pixels.is_contiguous():
        raise ValueError(f"pixels must be contiguous [P, {SIDE * SIDE}, {CHANNELS}], not {list(pixels.shape)}")
    if hyper.ndim != 3 or hyper.shape[0] != len(pixels) or hyper.shape[2] != OUTER or not len(pixels):
        raise ValueError(f"hyper must be [{len(pixels)}, K, {OUTER}], not {list(hyper.shape)}")
    if not 1 <= hyper.shape[1] <= MOST_MASKS or hyper.dtype != torch.float32 or not hyper.is_contiguous():
        raise ValueError(f"hyper must be contiguous float32 of 1 to {MOST_MASKS} masks, not {list(hyper.shape)}")
    check_table("weight1", weight1, pixels, (4 * INNER, CHANNELS))
    check_table("weight2", weight2, pixels, (4 * OUTER, INNER))
    for name, table, width in (
        ("bias1", bias1, INNER),
        ("norm_weight", norm_weight, INNER),
        ("norm_bias", norm_bias, INNER),
        ("bias2", bias2, OUTER),
    ):
        check_table(name, table, pixels, (width,))
    if has_no_kernel(pixels.device):
        return paint_logits_reference(pixels, hyper, weight1, bias1, norm_weight, norm_bias, eps, weight2, bias2)
    prompts, masks = hyper.shape[:2]
    out = hyper.new_empty(prompts, masks, 4 * SIDE, 4 * SIDE)
    _paint_kernel[(SIDE, prompts)](
        pixels, hyper, weight1, bias1, norm_weight, norm_bias, weight2, bias2, out, eps,
        K=masks, S=SIDE, C=CHANNELS, IN=INNER, OUT=OUTER, num_warps=4, num_stages=1,
    )  # fmt: skip
    return out


@paint_logits.register_fake
def _(
    pixels: torch.Tensor,
    hyper: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
) -> torch.Tensor:
    return hyper.new_empty(*hyper.shape[:2], 4 * SIDE, 4 * SIDE)
