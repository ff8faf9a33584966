"""The compiled attention kernels: every dtype, head size and batch, windows and the whole grid, against float64."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")

from splitsam.kernels.quantise_rows import LARGEST
from splitsam.kernels.relpos_global import global_attention, global_attention_reference
from splitsam.kernels.relpos_window import WINDOW, window_attention, window_attention_reference

HEADS = 2
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPERATORS = {"global": global_attention, "window": window_attention}
REFERENCES = {"global": global_attention_reference, "window": window_attention_reference}


def random_inputs(kernel: str, batch: int, grid: tuple[int, int], d: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """qkv, of windows its bias too, and both position tables, rounded to the dtype."""
    generator = torch.Generator("cuda").manual_seed(batch)
    sides = (WINDOW, WINDOW) if kernel == "window" else grid
    shapes = [(batch, grid[0] * grid[1], 3, HEADS, d), (3, HEADS, d), *((2 * side - 1, d) for side in sides)]
    inputs = [torch.randn(shape, generator=generator, device="cuda") for shape in shapes]
    for table in inputs[2:]:
        table.mul_(0.3)
    if kernel == "global":
        del inputs[1]
    return [tensor.to(dtype) for tensor in inputs]


def reference(kernel: str, inputs: list[torch.Tensor], grid: tuple[int, int], d: int) -> torch.Tensor:
    """Image by image: all scores at once would take tens of gigabytes."""
    qkv, *others = inputs
    return torch.cat([REFERENCES[kernel](image[None], *others, grid, d**-0.5) for image in qkv])


def check(kernel: str, inputs: list[torch.Tensor], grid: tuple[int, int]) -> None:
    d, dtype = inputs[0].shape[-1], inputs[0].dtype
    expected = reference(kernel, [tensor.double() for tensor in inputs], grid, d)
    same_dtype = (reference(kernel, inputs, grid, d).double() - expected).abs().max()
    found = (OPERATORS[kernel](*inputs, *grid, d**-0.5).double() - expected).abs().max()
    # In float32 both err by single roundings of numbers like the largest; a GPU's exp2 is two of them off by itself.
    least = 5e-6 * float(expected.abs().max()) if dtype == torch.float32 else 0.0
    assert found <= max(2 * float(same_dtype), least), f"kernel {found:.2e}, PyTorch {same_dtype:.2e}"


@pytest.mark.parametrize("batch", [1, 2, 7, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [64, 80])
@pytest.mark.parametrize("kernel", ["global", "window"])
def test_kernel_errs_no_more_than_twice_pytorch(kernel: str, d: int, dtype: torch.dtype, batch: int):
    check(kernel, random_inputs(kernel, batch, (64, 64), d, dtype), (64, 64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [64, 80])
@pytest.mark.parametrize(
    ("kernel", "grid"),
    [("global", (5, 7)), ("global", (33, 16)), ("global", (10, 64)), ("window", (5, 9)), ("window", (28, 15))],
)
def test_kernel_takes_any_grid(kernel: str, grid: tuple[int, int], d: int, dtype: torch.dtype):
    check(kernel, random_inputs(kernel, 3, grid, d, dtype), grid)


def misleading_inputs(d: int) -> list[torch.Tensor]:
    inputs = random_inputs("global", 2, (64, 64), d, torch.bfloat16)
    qkv = inputs[0]
    qkv[0, 4000, 1] = 40 * qkv[0, 5, 0]  # a late key that dwarfs all, for one query
    qkv[1, :64, 1, 1] = -20 * qkv[1, 2007, 0, 1]  # and a first row of keys that another cannot see
    return inputs


@pytest.mark.parametrize("d", [64, 80])
def test_queries_that_their_first_keys_mislead_are_computed_again(d: int):
    check("global", misleading_inputs(d), (64, 64))


@pytest.mark.parametrize("d", [64, 80])
@pytest.mark.parametrize("kernel", ["global", "window", "global, misled"])
def test_output_in_e4m3_errs_by_its_rounding_and_ends_at_its_largest_number(kernel: str, d: int):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no 8-bit floats")
    kernel, _, misled = kernel.partition(", ")
    inputs = misleading_inputs(d) if misled else random_inputs(kernel, 3, (64, 64), d, torch.bfloat16)
    inputs[0][:, :, 2] *= 30
    inputs[0][0, :, 2, 0, 0] = 1e6
    if kernel == "window":
        inputs[1][2, 0, 0] = 1e6
    exact, found = (OPERATORS[kernel](*inputs, 64, 64, d**-0.5, float8).float() for float8 in (False, True))
    assert (found[0, :, 0] == LARGEST).all()
    exact = exact.clamp(-LARGEST, LARGEST)
    # A sixteenth or half the smallest step, and the rounding to bfloat16 that one of the two had.
    assert ((found - exact).abs() <= exact.abs() * (1 / 16 + 1 / 128) + 2**-10).all()
    others = exact[1, :, 1:]
    assert 0.02 < (found[1, :, 1:] - others).norm() / others.norm() < 0.03
