"""Blocks of the encoder whose linear layers multiply 8-bit floats (e4m3), with one scale a row of either factor.

    out[m, n] = a_scale[m] w_scale[n] sum_k a[m, k] w[n, k] + bias[n],   sums in float32, out in bfloat16

What a layer is given is rounded where it is made, by kernels that have it in registers anyway:

    x, branch -> add_normalise_rows -> qkv -> attention -> proj -> branch
    x, branch -> add_normalise_rows -> gelu_product, which is lin1 -> lin2 -> branch

No program of attention, nor of a product, sees a whole row of its outputs, so they have one scale for all. What weights
can make of a normalised row bounds them, and e4m3 is as exact far below its largest number. Where there is no kernel
for `gelu_product`, lin1 and quantise_rows(gelu) take its place.

A block hands on its last branch beside x, so that the next one adds it where it normalises the sum.
Weights are rounded when the rung is applied, never in a file.
"""

# ruff: noqa: ARG001 (a fake takes all arguments)

import math
from typing import Any

import torch
from torch import Tensor, nn

from splitsam.kernels.gelu_product import gelu_product, has_gelu_product
from splitsam.kernels.normalise_rows import add_normalise_rows, normalise_rows
from splitsam.kernels.quantise_rows import LARGEST, quantise_rows, quantise_rows_reference

DTYPE = torch.bfloat16  # of what is not in 8 bits
Stream = Tensor | tuple[Tensor, Tensor]
_ROWS_OF_ONES = 16 * 4096  # tokens of the largest batch by default; larger ones make their own


class Float8Linear(nn.Module):
    """A linear layer on rows that are quantised already.

    Raises:
        ValueError: the weights are not in bfloat16, or another rung has changed them.
    """

    weight: Tensor  # [N, K] e4m3
    scales: Tensor  # [1, N] float32

    def __init__(self, layer: Any):
        super().__init__()
        if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter or layer.weight.dtype != DTYPE:
            raise ValueError("fp8 rounds weights in bfloat16: apply bf16 before, and neither int8 nor 2:4")
        weight, scales = quantise_rows_reference(layer.weight.detach())
        self.bias = layer.bias
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales.t().contiguous())

    def forward(self, rows: Tensor, row_scales: Tensor) -> Tensor:
        """[M, K] e4m3 and their scales [M, 1] to [M, N] bfloat16."""
        out: Tensor = scaled_product(rows, row_scales, self.weight, self.scales, self.bias)
        return out


class Float8Block(nn.Module):
    """`segment_anything`'s Block on 8-bit floats; its layers keep their names.

    Args:
        source: a block with KernelAttention, its weights in bfloat16.
        ones: [M, 1] float32 for all blocks, scales of as many rows.
        last: of the encoder, which gives the sum of what the others hand on.

    Raises:
        ValueError: as Float8Linear.
    """

    ones: Tensor

    def __init__(self, source: Any, ones: Tensor, last: bool):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = source.norm1, source.attn, source.norm2, source.mlp
        for module, names in ((self.attn, ("qkv", "proj")), (self.mlp, ("lin1", "lin2"))):
            for name in names:
                setattr(module, name, Float8Linear(getattr(module, name)))
        keep_in_range_(self.attn, self.norm1)
        self.register_buffer("ones", ones, persistent=False)
        lin1 = self.mlp.lin1
        lin1.register_buffer("out_scale", gelu_scale(lin1, self.norm2))
        self.in_one_kernel = has_gelu_product(lin1.weight)
        self.last = last

    def forward(self, stream: Stream) -> Stream:
        """x, or x and a branch that is still to be added, each [B, H, W, C], to the same of the next block."""
        x, branch = stream if isinstance(stream, tuple) else (stream, None)
        shape, rows = x.shape, x.flatten(0, 2)
        if branch is None:
            normal, scales = normalise_rows(rows, *_parameters(self.norm1))
        else:
            rows, normal, scales = add_normalise_rows(rows, branch.flatten(0, 2), *_parameters(self.norm1))
        batch, height, width, channels = shape
        heads = self.attn.num_heads
        qkv = self.attn.qkv(normal, scales).view(batch, height * width, 3, heads, channels // heads)
        attended = self.attn.attend(qkv, height, width, float8=True).flatten(0, 1)
        ones = self.ones[: len(rows)] if len(rows) <= len(self.ones) else self.ones.new_ones(len(rows), 1)
        branch = self.attn.proj(attended, ones)
        rows, normal, scales = add_normalise_rows(rows, branch, *_parameters(self.norm2))
        branch = self.mlp.lin2(*self._hidden(normal, scales))
        return (rows + branch).view(shape) if self.last else (rows.view(shape), branch.view(shape))

    def _hidden(self, normal: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        lin1 = self.mlp.lin1
        hidden: tuple[Tensor, Tensor]
        if self.in_one_kernel:
            hidden = gelu_product(normal, scales, lin1.weight, lin1.scales, lin1.bias, lin1.out_scale)
        else:
            hidden = quantise_rows(lin1(normal, scales), gelu=True)
        return hidden


def _parameters(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return norm.weight, norm.bias, norm.eps


def keep_in_range_(attention: Any, norm: nn.LayerNorm) -> None:
    """Divide values by a power of two, so that outputs of attention fit e4m3, and have `proj` multiply by it: exact."""
    qkv, proj = attention.qkv, attention.proj
    values = slice(2 * len(qkv.bias) // 3, None)
    largest = float(bound_values(qkv.weight[values], qkv.scales[:, values], qkv.bias[values], norm).max())
    scale = 2.0 ** math.ceil(math.log2(max(largest / LARGEST, 2.0**-60)))
    divisors = torch.ones_like(qkv.bias)
    divisors[values] = scale
    qkv.bias = nn.Parameter(qkv.bias / divisors, requires_grad=False)
    qkv.scales /= divisors.float()
    proj.scales *= scale


def bound_values(weight: Tensor, scales: Tensor, bias: Tensor, norm: nn.LayerNorm) -> Tensor:
    """[N] float32 that a layer's outputs, and so means of them, never exceed, whatever the image.

    A row that a LayerNorm has divided by its spread has the norm sqrt(K) at most: by Cauchy and Schwarz its products
    with weights are bounded. Rounding the row to e4m3 adds a sixteenth of each number, or half the smallest step.

    Args:
        weight, scales, bias: of a Float8Linear behind `norm`, [N, K], [1, N] and [N].
    """
    weight = weight.float() * scales.t()
    factors, offsets = norm.weight.float(), norm.bias.float()
    length = math.sqrt(weight.shape[1])
    products = length * (weight * factors).norm(dim=1)
    rounded = (products + weight.abs() @ offsets.abs()) / 16
    steps = weight.abs().sum(dim=1) * (length * factors.abs().max() + offsets.abs().max()) / LARGEST * 2.0**-10
    bound: Tensor = products + (weight @ offsets).abs() + rounded + steps + bias.float().abs()
    return bound * (33 / 32)  # for what sums, values and weights of attention are rounded by


def gelu_scale(layer: Float8Linear, norm: nn.LayerNorm) -> Tensor:
    """[1] float32 that brings the GELU of a layer behind `norm` into e4m3's range: it is max(h, 0.17) at most."""
    largest = bound_values(layer.weight, layer.scales, layer.bias, norm).max()
    scale: Tensor = largest.clamp(min=0.17).reshape(1) / LARGEST
    return scale


def use_float8_(encoder: Any) -> None:
    """Put Float8Blocks in the place of an image encoder's blocks, compiled where those are to be."""
    count = len(encoder.blocks)
    ones = torch.ones(_ROWS_OF_ONES, 1, device=encoder.blocks[0].norm1.weight.device)
    for i, block in enumerate(encoder.blocks):
        encoder.blocks[i] = Float8Block(block, ones, last=i == count - 1)
        if block._compiled_call_impl is not None:
            encoder.blocks[i].compile(fullgraph=True, dynamic=False)


@torch.library.custom_op("splitsam::scaled_product", mutates_args=())
def scaled_product(rows: Tensor, row_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor) -> Tensor:
    """Rows times the transpose of weights, all e4m3 with a scale a row: [M, N] in bfloat16; slow on a CPU.

    Args:
        rows: [M, K]; row_scales: [M, 1] float32.
        weight: [N, K]; weight_scales: [1, N] float32.
        bias: [N] bfloat16.
    """
    if rows.device.type != "cuda":
        product = (rows.float() * row_scales) @ (weight.float() * weight_scales.t()).t()
        return (product + bias.float()).to(bias.dtype)
    return torch._scaled_mm(
        rows,
        weight.t(),
        scale_a=row_scales,
        scale_b=weight_scales,
        bias=bias,
        out_dtype=bias.dtype,
        use_fast_accum=True,
    )


@scaled_product.register_fake
def _(rows: Tensor, row_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor) -> Tensor:
    return rows.new_empty(len(rows), len(weight), dtype=bias.dtype)
