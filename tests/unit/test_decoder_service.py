"""What the decoder service says of settings that it cannot follow."""

import pytest
import torch

from splitsam.decoder_service.service import kernel_notes
from splitsam.decoder_service.settings import DecoderSettings


@pytest.mark.parametrize(
    ("device", "kernels", "precision", "said"),
    [
        ("cpu", True, "fp32", None),
        ("cuda", True, "fp32", "cut masks alone"),
        ("cuda", True, "bf16", None),
        ("cuda", False, "bf16", "off"),
    ],
)
def test_kernels_that_are_not_used_are_named(device, kernels, precision, said):
    notes = kernel_notes(DecoderSettings(kernels=kernels, precision=precision), torch.device(device))
    assert (not notes) if said is None else said in notes[0]
