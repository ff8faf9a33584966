"""2:4 sparsity: of every four weights in a row the two largest are kept, and a GPU multiplies by those alone.

    out = x W^T + b,   W [N, K] with two zeros in every W[n, 4 i : 4 i + 4]

cuSPARSELt keeps W as its non-zeros and their places. Weights that torchao has quantised to int8 stay int8: their scale
is one for each row, so the order of the weights is that before quantising, and pruning before or after is the same.
Source: https://docs.nvidia.com/cuda/cusparselt/
"""

# ruff: noqa: ARG001 (a fake takes all arguments)

from typing import Any, Literal

import torch
from torch import Tensor, nn

Layers = Literal["all", "mlp"]
INT8_MAX = 127
# Keeps the scale of a row of zeros a number that can be divided by.
SMALLEST_SCALE = torch.finfo(torch.float32).eps


def prune_2_4_(module: nn.Module, which: Layers = "all") -> None:
    """Set half the weights of an image encoder's linear layers to zero, in place, with their dense layout kept.

    Args:
        module: an image encoder or a part of one; weights in any dtype, or quantised by torchao.
        which: all linear layers, or those of the MLPs.

    Source: the magnitude pruning of https://pytorch.org/blog/accelerating-generative-ai/, two of each four in a row.
    """
    for layer in find_linears(module, which).values():
        weights = _stored_weights(layer)
        weights.mul_(_largest_two_of_four(weights))


def sparsify_(image_encoder: nn.Module, which: Layers = "all") -> None:
    """Prune as `prune_2_4_` and put layers that compute on what is left in the place of the linear ones, on a GPU.

    On a CPU, which has no such arithmetic, the layers stay and give the same numbers.

    Raises:
        ValueError: on a GPU, for weights that are neither 16-bit nor int8.
    """
    prune_2_4_(image_encoder, which)
    for name, layer in find_linears(image_encoder, which).items():
        if _stored_weights(layer).device.type == "cuda":
            image_encoder.set_submodule(name, compress(layer))


def find_linears(module: nn.Module, which: Layers) -> dict[str, nn.Linear]:
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and (which == "all" or "mlp" in name.split("."))
    }


def _stored_weights(layer: nn.Linear) -> Tensor:
    """[N, K]: the int8 numbers where torchao has quantised the layer, else the weights."""
    weight: Any = layer.weight.detach()
    stored: Tensor = weight.qdata if hasattr(weight, "qdata") else weight
    return stored


def _largest_two_of_four(weights: Tensor) -> Tensor:
    """[N, K] of the same dtype: 1 for the two largest of each four in a row, of equal ones the first, else 0.

    A stable order makes all devices keep the same weights; int8 has many equal ones.
    """
    sizes = weights.float().abs().view(len(weights), -1, 4)
    kept = sizes.sort(dim=2, descending=True, stable=True).indices[..., :2]
    return torch.zeros_like(sizes).scatter_(2, kept, 1).flatten(1).to(weights.dtype)


def compress(layer: nn.Linear) -> nn.Module:
    """The layer that multiplies by what pruning has left of this one, on its GPU."""
    weights = _stored_weights(layer)
    if weights.dtype == torch.int8:
        return Int8SparseLinear(layer)
    if weights.dtype in (torch.bfloat16, torch.float16):
        return SparseLinear(layer)
    raise ValueError(f"2:4 sparsity is for weights in 16 bits or int8, not {weights.dtype}: apply bf16 or int8 before")


class SparseLinear(nn.Module):
    """A linear layer on 2:4 weights in 16 bits."""

    compressed: Tensor

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.bias = layer.bias
        self.register_buffer("compressed", torch._cslt_compress(layer.weight.detach()))

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        out: Tensor = sparse_product(x.flatten(0, -2), self.compressed, self.bias, None)
        return out.view(*x.shape[:-1], -1)


class Int8SparseLinear(nn.Module):
    """A linear layer on 2:4 weights in int8, its input quantised row by row as torchao does it for dense ones."""

    compressed: Tensor
    scales: Tensor  # [N] float32, of the rows of the weights

    def __init__(self, layer: nn.Linear):
        super().__init__()
        weight: Any = layer.weight.detach()
        self.bias = layer.bias
        self.register_buffer("compressed", torch._cslt_compress(weight.qdata))
        self.register_buffer("scales", weight.scale.flatten().float().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        quantised, scales = quantise_rows(x.flatten(0, -2))
        out: Tensor = sparse_product(quantised, self.compressed, None, self.scales)
        return (out * scales + self.bias).to(x.dtype).view(*x.shape[:-1], -1)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """[M, K] to int8 [M, K] and float32 scales [M, 1] whose product is x, nearly."""
    values = x.float()
    scales = (values.abs().amax(dim=1, keepdim=True) / INT8_MAX).clamp(min=SMALLEST_SCALE)
    return (values / scales).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scales


@torch.library.custom_op("splitsam::sparse_product", mutates_args=())
def sparse_product(x: Tensor, compressed: Tensor, bias: Tensor | None, scales: Tensor | None) -> Tensor:
    """[M, K] times the transpose of [N, K] weights that `torch._cslt_compress` has packed: [M, N], contiguous.

    Args:
        x: contiguous, in the dtype of the weights: 16 bits or int8. cuSPARSELt takes multiples of 8 rows or 16.
        bias: [N], with 16 bits.
        scales: [N] float32 factors of the columns of the answer, with int8; the answer is bfloat16.
    """
    out_dtype = torch.bfloat16 if x.dtype == torch.int8 else None
    return torch._cslt_sparse_mm(compressed, x.t(), bias=bias, alpha=scales, out_dtype=out_dtype, transpose_result=True)


@sparse_product.register_fake
def _(x: Tensor, compressed: Tensor, bias: Tensor | None, scales: Tensor | None) -> Tensor:
    return x.new_empty(len(x), len(compressed), dtype=torch.bfloat16 if x.dtype == torch.int8 else x.dtype)
