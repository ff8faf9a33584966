"""Blocks of the encoder whose linear layers multiply 8-bit floats (e4m3), with one scale a row of either factor.

    out[m, n] = a_scale[m] w_scale[n] sum_k a[m, k] w[n, k] + bias[n],   sums in float32, out in bfloat16

What a layer is given is rounded where it is made, by kernels that have it in registers anyway:

    x, branch -> add_normalise_rows -> qkv -> attention -> quantise_rows -> proj -> branch
    x, branch -> add_normalise_rows -> lin1 -> quantise_rows(gelu) -> lin2 -> branch

A block hands on its last branch beside x, so that the next one adds it where it normalises the sum.
Weights are rounded when the rung is applied, never in a file.
"""

# ruff: noqa: ARG001 (a fake takes all arguments)

from typing import Any

import torch
from torch import Tensor, nn

from splitsam.kernels.normalise_rows import add_normalise_rows, normalise_rows
from splitsam.kernels.quantise_rows import quantise_rows, quantise_rows_reference

DTYPE = torch.bfloat16  # of what is not in 8 bits
Stream = Tensor | tuple[Tensor, Tensor]


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
        last: of the encoder, which gives the sum of what the others hand on.

    Raises:
        ValueError: as Float8Linear.
    """

    def __init__(self, source: Any, last: bool):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = source.norm1, source.attn, source.norm2, source.mlp
        for module, names in ((self.attn, ("qkv", "proj")), (self.mlp, ("lin1", "lin2"))):
            for name in names:
                setattr(module, name, Float8Linear(getattr(module, name)))
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
        attended = self.attn.attend(qkv, height, width).flatten(0, 1)
        branch = self.attn.proj(*quantise_rows(attended))
        rows, normal, scales = add_normalise_rows(rows, branch, *_parameters(self.norm2))
        branch = self.mlp.lin2(*quantise_rows(self.mlp.lin1(normal, scales), gelu=True))
        return (rows + branch).view(shape) if self.last else (rows.view(shape), branch.view(shape))


def _parameters(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return norm.weight, norm.bias, norm.eps


def use_float8_(encoder: Any) -> None:
    """Put Float8Blocks in the place of an image encoder's blocks, compiled where those are to be."""
    count = len(encoder.blocks)
    for i, block in enumerate(encoder.blocks):
        encoder.blocks[i] = Float8Block(block, last=i == count - 1)
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
