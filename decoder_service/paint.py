"""From pixels and hypernetwork weights to logits: SAM's upscaling and the product that follows it, as one.

Both transposed convolutions have a stride equal to their kernel, so each is a linear layer of every pixel on its own:
a pixel becomes 2 x 2, each of those 2 x 2 again, and a weighted sum of the 32 channels of each is a logit. All of that
happens to a few pixels while they are in the cache; upscaled features of a whole prompt would take 8 MiB.

Source: `MaskDecoder.predict_masks` of segment_anything.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from splitsam.common.architectures import LOW_RES_SIDE_PX
from splitsam.decoder_service.prepared import GRID

# On a CPU what 1,024 pixels become takes 3 MiB at most: about a core's own cache.
PIXELS_AT_ONCE = 1024


def paint(upscaling: Any, pixels: Tensor, hyper: Tensor) -> Tensor:
    """Upscale pixels and weigh their channels.

    Args:
        upscaling: `MaskDecoder.output_upscaling`.
        pixels: [P, 4096, 256].
        hyper: [P, K, 32].

    Returns:
        [P, K, 256, 256] logits.
    """
    blocks = pixels.new_empty(len(pixels), GRID * GRID, 16, hyper.shape[1])
    for prompt, weights in enumerate(hyper):
        for start in range(0, GRID * GRID, PIXELS_AT_ONCE):
            part = slice(start, start + PIXELS_AT_ONCE)
            torch.matmul(_upscale(upscaling, pixels[prompt, part]), weights.mT, out=blocks[prompt, part])
    # The 2 x 2 blocks stayed behind one another until here, where only K channels are left to shuffle.
    blocks = blocks.view(len(pixels), GRID, GRID, 2, 2, 2, 2, -1).permute(0, 7, 1, 3, 5, 2, 4, 6)
    return blocks.reshape(len(pixels), -1, LOW_RES_SIDE_PX, LOW_RES_SIDE_PX)


def convolution_weight(convolution: Any) -> Tensor:
    """A transposed convolution of 2 x 2, stride 2, as a linear layer: [4 C_out, C_in], its four places in turn."""
    weight: Tensor = convolution.weight.permute(2, 3, 1, 0).flatten(0, 2)
    return weight


def _upscale(upscaling: Any, pixels: Tensor) -> Tensor:
    """[n, 256] to [n, 16, 32]."""
    first, norm, activation, second, last_activation = upscaling
    inner = F.linear(pixels, convolution_weight(first), first.bias.repeat(4)).view(len(pixels), 4, -1)
    inner = activation(F.layer_norm(inner, norm.weight.shape, norm.weight, norm.bias, norm.eps))
    upscaled = F.linear(inner, convolution_weight(second), second.bias.repeat(4)).view(len(pixels), 16, -1)
    channels: Tensor = last_activation(upscaled)
    return channels
