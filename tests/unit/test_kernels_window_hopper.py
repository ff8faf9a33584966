"""The windowed attention kernel for Hopper, step by step on the CPU, and compiled."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")

import window_on_cpu
from kernel_compiling import SHARED_BYTES, compiled, registers, serialised
from triton.experimental.gluon.language import NVMMASharedLayout

from splitsam.kernels.quantise_rows import FLOAT8
from splitsam.kernels.relpos_window import window_attention_reference
from splitsam.kernels.relpos_window_hopper import REGISTERS, hopper_window_kernel
from splitsam.kernels.window_copies import BOXES

GRIDS = [(1, 22, 1, 3), (2, 22, 2, 7), (1, 8, 1, 99), (1, 14, 1, 1)]


def inputs(batch: int, gh: int, heads: int, d: int) -> list[torch.Tensor]:
    torch.manual_seed(d + gh)
    shapes = ((batch, gh * 64, 3, heads, d), (3, heads, d), (27, d), (27, d))
    return [(std * torch.randn(shape)).bfloat16() for shape, std in zip(shapes, (1.0, 1.0, 0.3, 0.3), strict=True)]


def errors(tensors: list[torch.Tensor], gh: int, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `out` and of PyTorch in bfloat16, against float32."""
    scale = tensors[0].shape[-1] ** -0.5
    expected = window_attention_reference(*[tensor.float() for tensor in tensors], (gh, 64), scale)
    pytorch = window_attention_reference(*tensors, (gh, 64), scale)
    return (out - expected).abs(), (pytorch - expected).abs()


@pytest.mark.parametrize(("d", "stages"), [(64, 2), (64, 3), (80, 2)])
@pytest.mark.parametrize(("batch", "gh", "heads", "programs"), GRIDS)
def test_every_copy_and_product_is_waited_for(batch, gh, heads, programs, d, stages) -> None:
    tensors = inputs(batch, gh, heads, d)
    out = window_on_cpu.attention(*tensors, gh, d**-0.5, programs, stages)
    kernel, pytorch = errors(tensors, gh, out)
    assert kernel.max() <= 2 * pytorch.max()


@pytest.mark.parametrize("d", [64, 80])
def test_output_is_in_the_dtype_that_it_is_asked_for(d: int) -> None:
    tensors = inputs(1, 8, 2, d)
    exact = window_on_cpu.attention(*tensors, 8, d**-0.5, 4, 2, dtype=torch.float32)
    in_8_bits = window_on_cpu.attention(*tensors, 8, d**-0.5, 4, 2, dtype=FLOAT8)
    assert torch.equal(in_8_bits.float(), exact.to(FLOAT8).float())
    kernel, pytorch = errors(tensors, 8, exact)
    assert kernel.max() <= pytorch.max()


def test_what_is_not_finite_stays_in_its_window() -> None:
    tensors = inputs(1, 22, 1, 64)
    clean = window_on_cpu.attention(*tensors, 22, 0.125, 3)
    image = tensors[0].view(22, 64, 3, 64)
    image[:14, 14:28, 1] = float("inf")
    image[14:, 42:56, 2] = float("nan")
    out = window_on_cpu.attention(*tensors, 22, 0.125, 3).view(22, 64, 64)
    touched = torch.zeros(22, 64, dtype=torch.bool)
    touched[:14, 14:28] = touched[14:, 42:56] = True
    assert torch.equal(out[~touched], clean.view(22, 64, 64)[~touched])
    assert out[touched].isnan().all()


@pytest.mark.parametrize("large", [3e4, -3e4])
def test_terms_and_scores_of_any_size_leave_exact_weights(large: float) -> None:
    tensors = inputs(1, 14, 1, 64)
    tensors[0][:, :, 1] *= 20  # one key takes nearly all
    tensors[2][5] += large / 64
    out = window_on_cpu.attention(*tensors, 14, 0.125, 2)
    kernel, pytorch = errors(tensors, 14, out)
    assert kernel.max() <= 2 * pytorch.max()


def compile_window(d: int, out: str, stages: int):
    cubes = {f"{part}{box[0]}{box[1]}": (1, *box, width) for part, width in (("b", 64), ("n", d - 64)) for box in BOXES}
    tables = {f"{part}_{axis}": (32, width) for part, width in (("tables", 64), ("narrow", d - 64)) for axis in "hw"}
    types = {"qkv_bias": "*bf16", "out": f"*{out}", "scale_log2": "fp32", "inverse_scale": "fp32", "total": "i32"}
    constants: dict[str, object] = {"HEADS": 12 if d == 64 else 16, "GH": 64, "STAGES": stages, "D1": d - 64}
    for name, shape in (cubes | tables).items():
        if shape[-1]:
            types[name] = f"tensordesc<bf16{list(shape)},{NVMMASharedLayout(2 * shape[-1], 16, rank=len(shape))}>"
        else:
            constants[name] = None
    return compiled(hopper_window_kernel, types, constants, 90, {"num_warps": 4, "maxnreg": REGISTERS})


@pytest.mark.parametrize("out", ["bf16", "fp8e4nv"])
@pytest.mark.parametrize(("d", "stages"), [(64, 3), (80, 2)])
def test_two_programs_fit_on_a_multiprocessor(d: int, stages: int, out: str, tmp_path: Path) -> None:
    binary = compile_window(d, out, stages)
    assert ("cvt.rn.satfinite.e4m3x2.f32" in binary.asm["ptx"]) == (out == "fp8e4nv")
    used = registers(binary, tmp_path)
    print(f"shared {binary.metadata.shared}, {used}")
    assert used.get("STACK", 0) <= 16
    assert not serialised(binary, tmp_path)
    # Each with the 1 KiB that is the driver's, and with eight warps, as the one that copies counts for four.
    assert 2 * (binary.metadata.shared + 1024) <= SHARED_BYTES[90] + 1024
    assert 2 * 256 * used.get("REG", 0) <= 65536
