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

from splitsam.common.shapes import LOW_RES_SIDE_PX
from splitsam.decoder_service.prepared import GRID

# What 1,024 pixels become takes 3 MiB at most: about a CPU core's own cache.
PIXELS_AT_ONCE = 1024


class Painter:
    """`MaskDecoder.output_upscaling`, its convolutions as linear layers, in a dtype on a device.

    Args:
        kernel: use this project's, for 16-bit numbers on a GPU.
    """

    def __init__(self, upscaling: Any, device: torch.device, dtype: torch.dtype, kernel: bool = False):
        first, norm, _, second, _ = upscaling

        def cast(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device, dtype).contiguous()

        self._weight1, self._bias1 = cast(_as_linear(first)), cast(first.bias)
        self._weight2, self._bias2 = cast(_as_linear(second)), cast(second.bias)
        self._norm, self._eps = (cast(norm.weight), cast(norm.bias)), norm.eps
        self._has_kernel = kernel

    def paint(self, pixels: Tensor, hyper: Tensor) -> Tensor:
        """Upscale pixels and weigh their channels.

        Args:
            pixels: [P, 4096, 256].
            hyper: [P, K, 32] float32.

        Returns:
            [P, K, 256, 256] float32 logits.
        """
        if self._has_kernel:
            from splitsam.kernels.paint_logits import paint_logits  # Triton is on Linux alone

            first, second = (self._weight1, self._bias1), (self._weight2, self._bias2)
            logits: Tensor = paint_logits(pixels, hyper, *first, *self._norm, self._eps, *second)
            return logits
        hyper = hyper.to(pixels.dtype)
        at_once = PIXELS_AT_ONCE if pixels.device.type == "cpu" else GRID * GRID
        blocks = pixels.new_empty(len(pixels), GRID * GRID, 16, hyper.shape[1])
        for prompt, weights in enumerate(hyper):
            for start in range(0, GRID * GRID, at_once):
                part = slice(start, start + at_once)
                torch.matmul(self._upscale(pixels[prompt, part]), weights.mT, out=blocks[prompt, part])
        # The 2 x 2 blocks stayed behind one another until here, where only K channels are left to shuffle.
        blocks = blocks.view(len(pixels), GRID, GRID, 2, 2, 2, 2, -1).permute(0, 7, 1, 3, 5, 2, 4, 6)
        return blocks.reshape(len(pixels), -1, LOW_RES_SIDE_PX, LOW_RES_SIDE_PX).float()

    def _upscale(self, pixels: Tensor) -> Tensor:
        """[n, 256] to [n, 16, 32]."""
        weight, bias = self._norm
        inner = F.linear(pixels, self._weight1, self._bias1.repeat(4)).view(len(pixels), 4, -1)
        inner = F.gelu(F.layer_norm(inner, weight.shape, weight, bias, self._eps))
        upscaled = F.linear(inner, self._weight2, self._bias2.repeat(4)).view(len(pixels), 16, -1)
        return F.gelu(upscaled)


def _as_linear(convolution: Any) -> Tensor:
    """The weight of a transposed convolution of 2 x 2, stride 2: [4 C_out, C_in], its four places in turn."""
    weight: Tensor = convolution.weight.permute(2, 3, 1, 0).flatten(0, 2)
    return weight
