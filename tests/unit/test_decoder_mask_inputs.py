"""Mask inputs through one product a layer, as through the modules they are taken from."""

import pytest
import torch
from decoder_support import embedding, random_sam

from splitsam.decoder_service.mask_inputs import MaskDownscaling
from splitsam.decoder_service.masked_graphs import MaskedGraphs
from splitsam.decoder_service.network import Network


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("count", [1, 3])
def test_products_are_the_convolutions(count, dtype):
    layers = random_sam().prompt_encoder.mask_downscaling
    masks = (10 * torch.randn(count, 1, 256, 256, generator=torch.Generator().manual_seed(count))).to(dtype)
    with torch.inference_mode():
        expected = layers(masks.float()).flatten(2).mT
        torch.testing.assert_close(MaskDownscaling(layers)(masks), expected, atol=1e-5, rtol=1e-5)


def test_what_a_graph_does_is_what_launches_do_for_any_count_that_it_takes():
    """On a CPU without the graph; tests/gpu has it."""
    network = Network(random_sam(), torch.device("cpu"), torch.float32)
    masked = MaskedGraphs(network, counts=(1, 2))
    masks = (10 * torch.randn(3, 1, 256, 256, generator=torch.Generator().manual_seed(3))).half().numpy()
    with torch.inference_mode():
        images = [network.prepare(embedding(seed)) for seed in range(2)]
        assert not masked.take(masks[:1])
        masked.capture()
        for count in (2, 1):
            assert masked.take(masks[:count])
            found = masked.prepare(images[:count], masks[:count])
            wanted = network.prepare_masked(images[:count], torch.from_numpy(masks[:count]))
            assert len(found) == count
            for one, other in zip(found, wanted, strict=True):
                assert torch.equal(one.rows, other.rows)
    assert not masked.take(masks)
    assert not masked.take(masks[:1].astype("float32"))
