"""Mask inputs through one product a layer, as through the modules they are taken from."""

import pytest
import torch
from decoder_support import random_sam

from splitsam.decoder_service.mask_inputs import MaskDownscaling


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("count", [1, 3])
def test_products_are_the_convolutions(count, dtype):
    layers = random_sam().prompt_encoder.mask_downscaling
    masks = (10 * torch.randn(count, 1, 256, 256, generator=torch.Generator().manual_seed(count))).to(dtype)
    with torch.inference_mode():
        expected = layers(masks.float()).flatten(2).mT
        torch.testing.assert_close(MaskDownscaling(layers)(masks), expected, atol=1e-5, rtol=1e-5)
