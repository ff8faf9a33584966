"""What the rung fp8 does to the numbers of a block; test_optimize has what it does to an embedding."""

import math

import pytest
import torch
from random_encoders import random_encoder, random_images
from torch import nn

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")

from splitsam.encoder_service import float8
from splitsam.encoder_service.float8 import Float8Linear, bound_values
from splitsam.encoder_service.optimize import build_rungs
from splitsam.kernels.normalise_rows import normalise_rows


def test_values_are_divided_by_a_power_of_two_and_outputs_multiplied_by_it():
    rounded, in_8_bits = (
        build_rungs(random_encoder(80), rungs, torch.device("cpu")) for rungs in (("bf16",), ("bf16", "fp8"))
    )
    for before, block in zip(rounded.blocks, in_8_bits.blocks, strict=True):
        channels = before.attn.proj.in_features
        (factor,) = (block.attn.proj.scales / Float8Linear(before.attn.proj).scales).unique().tolist()
        assert math.log2(factor).is_integer()
        factors = torch.ones(3 * channels)
        factors[2 * channels :] = factor
        assert torch.equal(block.attn.qkv.scales * factors, Float8Linear(before.attn.qkv).scales)
        assert torch.equal(block.attn.qkv.bias.float() * factors, before.attn.qkv.bias.float())


@pytest.mark.parametrize("outlier", ["none", "output", "input", "bias", "factor", "offset", "small factors"])
@torch.no_grad()
def test_values_of_no_row_exceed_their_bound(outlier: str):
    """Also of the worst: a row along a channel's own weights, whose values come near the bound."""
    torch.manual_seed(0)
    norm, layer = nn.LayerNorm(192, eps=1e-6).bfloat16(), nn.Linear(192, 192).bfloat16()
    norm.weight.normal_()
    norm.bias.normal_(std=0.3)
    for tensor in {
        "none": [],
        "output": [layer.weight[7]],
        "input": [layer.weight[:, 7]],
        "bias": [layer.bias[7]],
        "factor": [norm.weight[7]],
        "offset": [norm.bias[7]],
        "small factors": [norm.weight[:7], norm.weight[8:]],
    }[outlier]:
        tensor.mul_(1e-3 if outlier == "small factors" else 50)
    product = Float8Linear(layer)
    bound = bound_values(product.weight, product.scales, product.bias, norm)
    one_channel = torch.eye(192) * 1000
    along_weights = layer.weight.float() * norm.weight.float()
    rows = torch.cat([torch.randn(64, 192), one_channel, along_weights, -along_weights]).bfloat16()
    values = product(*normalise_rows(rows, norm.weight, norm.bias, norm.eps)).abs()
    assert (values <= bound).all()
    assert values.max() > bound.max() / 2


@torch.inference_mode()
def test_more_rows_than_there_are_ones_are_multiplied_too(monkeypatch: pytest.MonkeyPatch):
    images = random_images(2)
    expected = build_rungs(random_encoder(64), ("bf16", "fp8"), torch.device("cpu"))(images)
    monkeypatch.setattr(float8, "_ROWS_OF_ONES", 300)  # of 512
    found = build_rungs(random_encoder(64), ("bf16", "fp8"), torch.device("cpu"))(images)
    assert torch.equal(found, expected)


@torch.no_grad()
def test_bound_knows_of_numbers_that_round_up_to_the_smallest_step():
    signs = torch.tensor([1.0, -1.0]).repeat(96)
    norm, layer = nn.LayerNorm(192, eps=1e-6).bfloat16(), nn.Linear(192, 192, bias=True).bfloat16()
    row = 0.6 * signs
    row[:2] *= 13
    norm.weight[2:] = 2.9e-5  # a little more than half the smallest step
    layer.weight[:], layer.bias[:] = signs, 0
    layer.weight[:, :2] = 0
    product = Float8Linear(layer)
    (value,) = product(*normalise_rows(row[None].bfloat16(), norm.weight, norm.bias, norm.eps))[:, 0].float()
    bound = bound_values(product.weight, product.scales, product.bias, norm)[0]
    products = 192**0.5 * (layer.weight[0] * norm.weight).float().norm()
    assert 1.1 * products < value <= bound < 2 * value
