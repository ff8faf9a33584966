"""The MLP of a block with its GELU in the epilogue of the first product: the sums are still in registers there.

    x [..., C] -> gelu(x W1^T + b1) [..., 4 C] -> . W2^T + b2 -> [..., C]

Apart, the GELU reads and writes [..., 4 C] once more. The epilogue of cuBLASLt has the tanh form,
x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), which is never more than 5e-4 away from x Phi(x), the form with erf.
It takes sums before they are rounded to 16 bits, so in bf16 the two together err less than the exact form apart.
"""

# ruff: noqa: ARG001 (a fake takes all arguments)

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FusedMlp(nn.Module):
    """`segment_anything`'s MLPBlock with `linear_gelu` for its first layer and its GELU.

    Once a later rung has changed the first layer's weights, the layer and the exact GELU follow one another again.

    Args:
        source: `segment_anything`'s MLPBlock; its layers keep their names.
    """

    # Modules themselves until a sparse rung puts its own in their place.
    lin1: nn.Module
    lin2: nn.Module

    def __init__(self, source: Any):
        super().__init__()
        self.lin1, self.lin2, self.act = source.lin1, source.lin2, source.act

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] to [..., C]."""
        out: Tensor
        if isinstance(self.lin1, nn.Linear) and type(self.lin1.weight) is nn.Parameter:
            hidden = linear_gelu(x.flatten(0, -2), self.lin1.weight, self.lin1.bias)
            out = self.lin2(hidden).view(x.shape)
        else:
            out = self.lin2(self.act(self.lin1(x)))
        return out


@torch.library.custom_op("splitsam::linear_gelu", mutates_args=())
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer and a GELU in the tanh form: [M, K] to [M, N], contiguous; on a CPU one after the other.

    Args:
        weight: [N, K], in the dtype of x; bias: [N], likewise.
    """
    if x.device.type != "cuda":
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)


@linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(len(x), len(weight))
