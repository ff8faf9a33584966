"""The decoder's upscaling and hypernetwork product as one kernel: pixels in, logits out.

    z[n, s]       = GELU(LayerNorm(W1[s] x[n] + b1))    s: the 2 x 2 pixels that a transposed convolution makes of one
    l[k, n, s, t] = h[k] . GELU(W2[t] z[n, s] + b2)     t: the 2 x 2 of each of those

A program per (row of 64 pixels, prompt) makes 4 rows of 256 logits of it, for the K masks that were asked for, one of
the four places s after the other: it has a quarter of W1 and of the registers, so several programs share a
multiprocessor. The upscaled features, 4 MiB a prompt in 16 bits, exist in registers alone.

Per prompt: 4096 x (4 x 256 x 64 + 16 x 64 x 32 + 16 x 32 K) products, 0.8 GFLOP at K = 1; 2 MiB read, 0.25 K written.
GELU is evaluated 3.1 million times: more instructions than all the rest. In bfloat16 on a GPU it is the tanh form,
with the GPU's own tanh: 4e-4 from the exact one at most, as much as a feature of 0.2 may be rounded by.
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
def _gelu(x, TANH: tl.constexpr):
    """x (1 + erf(x / sqrt 2)) / 2 with an erf that is 1.5e-7 off at most: Abramowitz and Stegun, 7.1.26.

    With TANH x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, in half as many instructions.
    """
    if TANH:
        inner = x * (0.7978845608028654 + 0.035677408136300125 * x * x)
        t = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=r,r", [inner], tl.float32, is_pure=True, pack=1)
        return 0.5 * x + 0.5 * x * t
    a = tl.abs(x)
    t = 1.0 / (1.0 + 0.23164189 * a)
    p = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return tl.maximum(x, 0.0) - 0.5 * a * p * tl.exp2(x * x * -0.7213475204444817)


@triton.jit
def _paint_kernel(
    pixels, hyper, weight1, bias1, norm_weight, norm_bias, weight2, bias2, out,
    eps,
    K: tl.constexpr, S: tl.constexpr, C: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    """A program per (row of pixels, prompt)."""
    y, prompt = tl.program_id(0), tl.program_id(1)
    n, c, i, o = tl.arange(0, S), tl.arange(0, C), tl.arange(0, IN), tl.arange(0, OUT)
    x = tl.load(pixels + (prompt.to(tl.int64) * S + y) * (S * C) + n[:, None] * C + c[None, :])
    first_bias, second_bias = tl.load(bias1 + i).to(tl.float32)[None, :], tl.load(bias2 + o).to(tl.float32)[None, :]
    scale, shift = tl.load(norm_weight + i).to(tl.float32)[None, :], tl.load(norm_bias + i).to(tl.float32)[None, :]
    pairs = tl.arange(0, 2 * S)  # x, then tx
    columns = 4 * (pairs // 2) + pairs % 2
    for s in tl.static_range(4):
        w1 = tl.load(weight1 + (s * IN + i)[:, None] * C + c[None, :])
        z = tl.dot(x, tl.trans(w1), input_precision="ieee") + first_bias
        z -= (tl.sum(z, 1) / IN)[:, None]
        z = z * (1.0 / tl.sqrt_rn(tl.sum(z * z, 1) / IN + eps))[:, None] * scale + shift
        z = _gelu(z, TANH).to(x.dtype)
        for ty in tl.static_range(2):
            w2 = tl.load(weight2 + (2 * ty * OUT + tl.arange(0, 2 * OUT))[:, None] * IN + i[None, :])
            features = tl.reshape(tl.dot(z, tl.trans(w2), input_precision="ieee"), [2 * S, OUT])
            features = _gelu(features + second_bias, TANH)
            for k in tl.static_range(K):
                h = tl.load(hyper + (prompt * K + k) * OUT + o)[None, :]
                row = ((prompt * K + k) * (4 * S) + 4 * y + 2 * (s // 2) + ty).to(tl.int64)
                tl.store(out + row * (4 * S) + 2 * (s % 2) + columns, tl.sum(features * h, 1))


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
    tanh = pixels.dtype == torch.bfloat16 and pixels.device.type == "cuda"
    _paint_kernel[(SIDE, prompts)](
        pixels, hyper, weight1, bias1, norm_weight, norm_bias, weight2, bias2, out, eps,
        K=masks, S=SIDE, C=CHANNELS, IN=INNER, OUT=OUTER, TANH=tanh, num_warps=4, num_stages=1,
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
