"""`gelu_product`: its kernel compiled for an H100 and run part by part on the CPU, and its operator on a CPU."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")

import gelu_product_on_cpu
from kernel_compiling import SHARED_BYTES, compiled, registers, serialised

from splitsam.encoder_service.float8 import Float8Linear, gelu_scale
from splitsam.kernels import gelu_product_hopper as hopper
from splitsam.kernels.gelu_product import gelu_product, gelu_product_reference, has_gelu_product
from splitsam.kernels.normalise_rows import normalise_rows
from splitsam.kernels.quantise_rows import FLOAT8, LARGEST


@pytest.mark.parametrize("inputs", [768, 1024, 1280])
def test_hopper_kernel_fits_a_multiprocessor_and_multiplies_while_it_finishes(inputs: int, tmp_path: Path):
    from triton.experimental.gluon.language import NVMMASharedLayout

    types = {"M": "i32", "N": "i32", "bias": "*bf16"}
    types |= dict.fromkeys(("row_scales", "weight_scales", "out_scale", "scales"), "*fp32")
    for name, block in (("rows", [128, 128]), ("weight", [256, 128]), ("out", [64, 128])):
        types[name] = f"tensordesc<fp8e4nv{block},{NVMMASharedLayout(128, 8)}>"
    binary = compiled(hopper.hopper_product_kernel, types, {"STEPS": inputs // 128}, 90, {"num_warps": 4})
    ptx = binary.asm["ptx"]
    assert len(re.findall(r"wgmma.mma_async\S+m64n256k32\S+e4m3.e4m3", ptx)) == 2 * 128 // 32
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx
    assert "tanh.approx.f32" in ptx
    assert binary.metadata.shared <= SHARED_BYTES[90]
    assert registers(binary, tmp_path).get("STACK", 0) == 0
    assert not serialised(binary, tmp_path)


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "programs"),
    [(200, 272, 512, 2), (1, 16, 256, 1), (700, 768, 512, 2), (130, 1280, 256, 1)],
)
def test_every_copy_product_and_store_is_waited_for(rows: int, inputs: int, outputs: int, programs: int):
    arguments, _ = layer(rows, inputs, outputs)
    expected, expected_scales = gelu_product_reference(*arguments)
    out, scales = gelu_product_on_cpu.gelu_product(*arguments, programs=programs)
    assert torch.equal(scales, expected_scales)
    found, wanted = out.float(), expected.float()
    # Sums in another order are rounded to the number beside it now and then.
    assert ((found - wanted).abs() <= 0.126 * wanted.abs() + 2**-9).all()
    assert (found == wanted).float().mean() > 0.999


def layer(rows: int = 5, inputs: int = 192, outputs: int = 256, outlier: float = 1.0):
    """Rows of a LayerNorm and a layer behind it, as `gelu_product` takes them, and the GELU it should give."""
    torch.manual_seed(inputs)
    x = torch.randn(rows, inputs)
    norm = nn.LayerNorm(inputs).requires_grad_(False)
    norm.weight.uniform_(0.5, 1.5)
    norm.bias.normal_(std=0.25)
    x[:, 3] *= outlier
    norm.weight[5] *= outlier
    normal, scales = normalise_rows(x, norm.weight, norm.bias, 1e-6)
    linear = nn.Linear(inputs, outputs, dtype=torch.bfloat16).requires_grad_(False)
    linear.weight.normal_(std=inputs**-0.5)
    linear.bias.normal_()
    rounded = Float8Linear(linear)
    weight = rounded.weight.float() * rounded.scales.t()
    expected = F.gelu((normal.float() * scales) @ weight.t() + linear.bias.float(), approximate="tanh")
    return (normal, scales, rounded.weight, rounded.scales, linear.bias, gelu_scale(rounded, norm)), expected


@pytest.mark.parametrize("outlier", [1.0, 30.0, 1000.0])
def test_outputs_stay_within_their_bound_and_err_by_their_rounding(outlier: float):
    arguments, expected = layer(512, outlier=outlier)
    out, scales = gelu_product(*arguments)
    assert (out.dtype, scales.shape) == (FLOAT8, (512, 1))
    assert (scales == arguments[-1]).all()
    assert expected.abs().max() <= LARGEST * arguments[-1]
    found = out.float() * scales
    smallest_step = arguments[-1] * 2**-9
    allowed = 1.001 * torch.maximum(expected.abs() / 16, smallest_step / 2) + 1e-6
    assert ((found - expected).abs() <= allowed).all()
    assert (found - expected).norm() / expected.norm() < 0.03


def test_what_is_not_finite_stays_so():
    arguments, _ = layer()
    arguments[1][0] = torch.nan
    out, scales = gelu_product(*arguments)
    assert not (out.float() * scales)[0].isfinite().any()
    assert (out.float() * scales)[1:].isfinite().all()


@pytest.mark.parametrize(
    ("at", "wrong", "message"),
    [
        (0, torch.zeros(5, 96).to(FLOAT8), "must be .M, K. and .N, K."),
        (0, torch.zeros(0, 192).to(FLOAT8), "nothing empty"),
        (2, torch.zeros(320, 192).to(FLOAT8), "N of 256"),
        (0, torch.zeros(5, 192), "rows must be"),
        (1, torch.zeros(5), "row_scales must be"),
        (2, torch.zeros(192, 256).to(FLOAT8).t(), "weight must be contiguous"),
        (3, torch.zeros(256, 1), "weight_scales must be"),
        (4, torch.zeros(255), "bias must be"),
        (5, torch.zeros(1, dtype=torch.float64), "out_scale must be"),
    ],
)
def test_what_the_kernel_cannot_take_is_refused(at: int, wrong: torch.Tensor, message: str):
    arguments, _ = layer()
    with pytest.raises(ValueError, match=message):
        gelu_product(*arguments[:at], wrong, *arguments[at + 1 :])


def test_other_layers_than_it_takes_are_known_beforehand():
    assert has_gelu_product(torch.zeros(512, 16))
    assert not has_gelu_product(torch.zeros(640, 16))


def test_operator_keeps_its_promises_to_the_compiler():
    # Comparing schemas multiplies the inputs, which e4m3 has no operator for.
    torch.library.opcheck(gelu_product, layer()[0], test_utils="test_faketensor")
