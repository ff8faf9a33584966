"""The compiled kernels that quantise rows, and the products on their answers, against float64."""

import pytest
import torch
from random_encoders import relative_error
from torch import nn
from torch.nn import functional as F

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")

from splitsam.encoder_service.float8 import Float8Linear, gelu_scale
from splitsam.encoder_service.fused import linear_gelu
from splitsam.encoder_service.optimize import FP8, unsupported
from splitsam.kernels.gelu_product import gelu_product, gelu_product_reference, has_gelu_product
from splitsam.kernels.normalise_rows import add_normalise_rows, normalise_rows, normalise_rows_reference
from splitsam.kernels.quantise_rows import FLOAT8, quantise_rows, quantise_rows_reference

GPU = torch.device("cuda", 0)
EPSILON = 1e-6
ROWS = [1, 7, 4096]
CHANNELS = [192, 768, 1024, 1280, 3072, 4096, 5120]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture
def float8_units() -> None:
    reason = unsupported(FP8, GPU)
    if reason is not None:
        pytest.skip(reason)


def rows_of(count: int, channels: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes."""
    generator = torch.Generator("cuda").manual_seed(seed)
    sizes = torch.logspace(-2, 1, count, device=GPU)[:, None]
    return (sizes * torch.randn(count, channels, generator=generator, device=GPU)).to(dtype)


def errors_of(quantised: torch.Tensor, scales: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Of each row, relative to it."""
    assert (quantised.dtype, quantised.shape) == (FLOAT8, expected.shape)
    assert (scales.dtype, scales.shape) == (torch.float32, (len(expected), 1))
    return (quantised.double() * scales - expected).norm(dim=1) / expected.norm(dim=1)


@pytest.mark.usefixtures("float8_units")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("count", ROWS)
def test_kernels_err_no_more_than_twice_pytorch(count: int, channels: int, dtype: torch.dtype):
    x, branch = rows_of(count, channels, dtype), rows_of(count, channels, dtype, seed=1)
    weight, bias = torch.randn(2, channels, device=GPU).to(dtype)

    def norm(rows: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(rows.double(), (channels,), weight.double(), bias.double(), EPSILON)

    total, *added = add_normalise_rows(x, branch, weight, bias, EPSILON)
    assert torch.equal(total, x + branch)
    for found, same, expected in (
        (quantise_rows(x), quantise_rows_reference(x), x.double()),
        (quantise_rows(x, True), quantise_rows_reference(x, True), F.gelu(x.double(), approximate="tanh")),
        (normalise_rows(x, weight, bias, EPSILON), normalise_rows_reference(x, weight, bias, EPSILON), norm(x)),
        (added, normalise_rows_reference(total, weight, bias, EPSILON), norm(total)),
    ):
        error = errors_of(*found, expected)
        assert (error <= 2 * errors_of(*same, expected)).all()
        assert error.max() < 0.035


@pytest.mark.usefixtures("float8_units")
def test_what_is_not_finite_stays_so_in_its_row_alone():
    x = rows_of(4, 768, torch.bfloat16)
    x[0], x[1, 5], x[2, 5] = 0, torch.inf, torch.nan
    quantised, scales = quantise_rows(x)
    found = quantised.float() * scales
    assert not found[0].any()
    assert not found[1:3, 5].isfinite().any()
    assert found[3].isfinite().all()


def random_layer(channels: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(channels, outputs, device=GPU, dtype=torch.bfloat16).requires_grad_(False)
    layer.weight.normal_(std=channels**-0.5)
    layer.bias.normal_()
    return layer


@pytest.mark.usefixtures("float8_units")
@pytest.mark.parametrize(("channels", "outputs"), [(192, 576), (768, 3072), (1280, 1280), (5120, 1280)])
@pytest.mark.parametrize("count", ROWS)
def test_product_errs_by_the_rounding_of_its_factors(count: int, channels: int, outputs: int):
    layer = random_layer(channels, outputs)
    x = torch.randn(count, channels, device=GPU).bfloat16()
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    rows, scales = quantise_rows(x)
    product = Float8Linear(layer)
    found = product(rows, scales)
    assert (found.dtype, found.shape) == (torch.bfloat16, exact.shape)
    dequantised = F.linear(rows.double() * scales, product.weight.double() * product.scales.t(), layer.bias.double())
    # Rounding to bf16 is 2e-3; sums of e4m3 products keep some 13 bits.
    assert relative_error(found, dequantised.float()) < 1e-2
    same = relative_error(dequantised.bfloat16(), exact.float())
    assert relative_error(found, exact.float()) <= min(2 * same, 0.06)


@pytest.mark.usefixtures("float8_units")
@pytest.mark.parametrize(("channels", "outputs"), [(192, 768), (768, 3072), (1024, 4096), (1280, 5120)])
@pytest.mark.parametrize("count", [*ROWS, 40_000])
def test_gelu_product_errs_by_the_rounding_of_what_it_gives(count: int, channels: int, outputs: int):
    layer = Float8Linear(random_layer(channels, outputs))
    if not has_gelu_product(layer.weight):
        pytest.skip("no Hopper")
    rows, row_scales = quantise_rows(torch.randn(count, channels, device=GPU).bfloat16())
    bound = gelu_scale(layer, nn.LayerNorm(channels, device=GPU)).detach()
    arguments = (rows, row_scales, layer.weight, layer.scales, layer.bias, bound)
    expected, expected_scales = gelu_product_reference(*arguments)
    found, scales = gelu_product(*arguments)
    assert torch.equal(scales, expected_scales)
    difference = (found.float() - expected.float()).abs()
    # Sums of e4m3 products keep some 13 bits, so what lies between two numbers is rounded to either. For a negative h
    # GELU is what 1 + tanh leaves of h / 2, and the chip's tanh errs by 5e-4.
    assert (difference <= expected.float().abs() / 7 + 0.005 / bound).all()
    assert relative_error(found.float(), expected.float()) < 0.02


@pytest.mark.parametrize(("channels", "outputs"), [(192, 768), (768, 3072), (1280, 5120)])
@pytest.mark.parametrize("count", ROWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fused_gelu_errs_no_more_than_twice_layer_and_gelu_apart(
    dtype: torch.dtype, count: int, channels: int, outputs: int
):
    layer = random_layer(channels, outputs).to(dtype)
    x = torch.randn(count, channels, device=GPU).to(dtype)
    exact = F.gelu(F.linear(x.double(), layer.weight.double(), layer.bias.double())).float()
    apart = relative_error(F.gelu(layer(x)), exact)
    assert relative_error(linear_gelu(x, layer.weight, layer.bias), exact) <= 2 * apart
