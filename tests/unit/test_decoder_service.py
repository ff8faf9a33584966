"""What the decoder service says of settings that it cannot follow."""

import pytest
import torch

from splitsam.decoder_service.service import kernel_notes
from splitsam.decoder_service.settings import DecoderSettings


@pytest.mark.parametrize(
    ("device", "precision", "said"),
    [("cpu", "fp32", "need a CUDA GPU"), ("cuda", "fp32", "cut masks alone"), ("cuda", "bf16", None)],
)
def test_kernels_that_are_not_used_are_named(device, precision, said):
    notes = kernel_notes(DecoderSettings(kernels=True, precision=precision), torch.device(device))
    assert (not notes) if said is None else said in notes[0]
    assert kernel_notes(DecoderSettings(precision=precision), torch.device(device)) == ()
