"""The kernels that quantise rows, in Triton's interpreter against float64, and their operators on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")

from splitsam.kernels.normalise_rows import add_normalise_rows, normalise_rows
from splitsam.kernels.quantise_rows import FLOAT8, LARGEST, quantise_rows

NAMES = ["quantise", "gelu", "normalise", "add"]
CASES = [f"{shape} {dtype}" for shape in ("1x16", "3x48", "7x192", "2x1280") for dtype in ("float32", "float16")]
ROUNDING = 5e-7  # a few of float32


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    program = Path(__file__).with_name("row_kernels_interpreted.py")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_kernel_scales_rows_to_the_range_of_e4m3(interpreted: dict[str, dict[str, float]], name: str, case: str):
    found = interpreted[f"{name} {case}"]
    assert found["values"] <= ROUNDING
    assert found["scales"] <= ROUNDING
    assert found.get("sum", 0) == 0
    # The only row of the one case is zeros.
    assert found["largest"] == pytest.approx(0 if (name, case[:4]) == ("quantise", "1x16") else LARGEST, rel=ROUNDING)


def test_every_interpreted_case_is_asserted(interpreted: dict[str, dict[str, float]]):
    assert set(interpreted) == {f"{name} {case}" for name in NAMES for case in CASES}


def rows_of(count: int = 5, channels: int = 192, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Rows of very different sizes."""
    sizes = torch.logspace(-3, 3, count)[:, None]
    return (sizes * torch.randn(count, channels, generator=torch.Generator().manual_seed(channels))).to(dtype)


def check_rounding(quantised: torch.Tensor, scales: torch.Tensor, expected: torch.Tensor) -> None:
    """Three bits behind the point err by a sixteenth at most and 2 to 3 % on average, each row by itself."""
    assert (quantised.dtype, scales.dtype, scales.shape) == (FLOAT8, torch.float32, (len(expected), 1))
    found = quantised.float() * scales
    smallest_step = scales * 2**-9
    assert ((found - expected).abs() <= 1.001 * torch.maximum(expected.abs() / 16, smallest_step / 2)).all()
    by_row = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert (by_row < 0.03).all()
    assert by_row.mean() > 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantised_rows_err_by_their_rounding(dtype: torch.dtype):
    x = rows_of(dtype=dtype)
    check_rounding(*quantise_rows(x), x.float())
    x = x / 100
    check_rounding(*quantise_rows(x, gelu=True), F.gelu(x.float(), approximate="tanh"))


def test_normalised_rows_err_by_their_rounding():
    x, branch = rows_of(), rows_of().flip(1)
    weight, bias = x[2], branch[2].flip(0)
    expected = F.layer_norm(x.float(), (192,), weight.float(), bias.float(), 1e-6)
    check_rounding(*normalise_rows(x, weight, bias, 1e-6), expected)
    total, *quantised = add_normalise_rows(x, branch, weight, bias, 1e-6)
    assert torch.equal(total, x + branch)
    check_rounding(*quantised, F.layer_norm(total.float(), (192,), weight.float(), bias.float(), 1e-6))


def test_rows_of_zeros_stay_zeros_and_what_is_not_finite_stays_so():
    x = rows_of(3)
    x[0], x[1, 0], x[2, 0] = 0, torch.inf, torch.nan
    quantised, scales = quantise_rows(x)
    assert not quantised[0].float().any()
    assert scales[0] > 0
    assert not (quantised.float() * scales)[1:, 0].isfinite().any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(4, 24), "C a multiple of 16"),
        (torch.zeros(0, 32), "must be"),
        (torch.zeros(2, 2, 32), "must be"),
        (torch.zeros(1, 16384), "up to 8192"),
        (torch.zeros(4, 32, dtype=torch.float64), "must be of"),
        (torch.zeros(32, 16).T, "must be contiguous"),
        (torch.zeros(65)[1:].view(4, 16), "multiple of 16 bytes"),
    ],
)
def test_rows_that_a_kernel_cannot_take_are_refused(wrong: torch.Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        quantise_rows(wrong)
    with pytest.raises(ValueError, match=message):
        normalise_rows(wrong, torch.zeros(32), torch.zeros(32), 1e-6)


def test_branch_and_layer_norm_must_fit_the_rows():
    x, row = torch.zeros(4, 32), torch.zeros(32)
    for branch in (torch.zeros(3, 32), x.half()):
        with pytest.raises(ValueError, match="branch must be like x"):
            add_normalise_rows(x, branch, row, row, 1e-6)
    with pytest.raises(ValueError, match="bias must be"):
        normalise_rows(x, row, torch.zeros(16), 1e-6)


def test_operators_keep_their_promises_to_the_compiler():
    x, row = rows_of(dtype=torch.float32), torch.ones(192)
    for operator, arguments in (
        (quantise_rows, (x, True)),
        (normalise_rows, (x, row, row, 1e-6)),
        (add_normalise_rows, (x, x.clone(), row, row, 1e-6)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
