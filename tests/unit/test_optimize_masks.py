"""What a rung does to masks of trained weights: the shipped vit_t against itself in fp32."""

import copy

import pytest
import torch
from mask_agreement import ClickedPhotograph, load_photograph, mean_iou

from splitsam.encoder_service.optimize import build_rungs


@pytest.fixture(scope="module")
def photograph() -> ClickedPhotograph:
    return load_photograph()


@torch.inference_mode()
def encode(photograph: ClickedPhotograph, *rungs: str) -> torch.Tensor:
    encoder = build_rungs(copy.deepcopy(photograph.sam.image_encoder), rungs, torch.device("cpu"))
    embedding: torch.Tensor = encoder(photograph.pixels)
    return embedding


@pytest.mark.parametrize(
    ("rungs", "bound"),
    [
        (("sdpa",), 0.9999),
        (("triton",), 0.9999),
        (("fused",), 0.999),
        (("bf16", "triton", "fused"), 0.99),
        (("sdpa", "int8"), 0.985),
        (("bf16", "fp8"), 0.98),
    ],
)
def test_masks_agree_with_those_of_fp32(photograph: ClickedPhotograph, rungs: tuple[str, ...], bound: float):
    assert mean_iou(photograph, encode(photograph, *rungs)) >= bound


def test_agreement_sees_what_pruning_does_to_masks(photograph: ClickedPhotograph):
    assert mean_iou(photograph, encode(photograph, "triton", "sparse")) < 0.95
