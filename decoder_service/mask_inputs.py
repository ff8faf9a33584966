"""Mask inputs on their way into the prompt encoder."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class MaskDownscaling:
    """`PromptEncoder.mask_downscaling` of segment_anything: each convolution as one product, channels last.

    Its kernels are as wide as their strides, so their patches do not overlap. As modules the layers are more launches,
    most of them of the two LayerNorm2d.

    Args:
        layers: convolution of 2 x 2, LayerNorm2d, GELU, the same again, convolution of 1 x 1.
    """

    def __init__(self, layers: Any):
        self._convolutions = [(layer.weight.flatten(1), layer.bias) for layer in (layers[0], layers[3], layers[6])]
        self._norms = [(layer.weight, layer.bias, layer.eps) for layer in (layers[1], layers[4])]

    def __call__(self, masks: Tensor) -> Tensor:
        """[M, 1, 256, 256] logits of any floating dtype to [M, 4096, 256] float32."""
        x = masks.float()[:, 0, :, :, None]
        *strided, last = self._convolutions
        for (weight, bias), (scale, shift, eps) in zip(strided, self._norms, strict=True):
            x = F.linear(_patches(x), weight, bias)
            x = F.gelu(F.layer_norm(x, scale.shape, scale, shift, eps))
        return F.linear(x, *last).flatten(1, 2)


def _patches(x: Tensor) -> Tensor:
    """[M, H, W, C] to [M, H / 2, W / 2, 4 C], the channels of a patch in the order of a convolution's weight."""
    count, height, width, channels = x.shape
    x = x.view(count, height // 2, 2, width // 2, 2, channels)
    return torch.flatten(x.permute(0, 1, 3, 5, 2, 4), 3)
