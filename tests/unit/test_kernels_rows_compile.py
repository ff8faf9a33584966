"""The kernels that quantise rows, compiled for an H100 (sm_90) at production widths, without one."""

import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")

from kernel_compiling import compiled, registers
from triton.compiler.errors import CompilationError

from splitsam.kernels.normalise_rows import _normalise_kernel
from splitsam.kernels.quantise_rows import _quantise_kernel, row_options

REGISTERS = 64  # with no more, half the threads that an SM takes are there at once
QUANTISED = {"out": "*fp8e4nv", "scales": "*fp32"}


def compile_kernel(kernel: str, channels: int, arch: int = 90):
    constants: dict[str, object] = row_options(channels)
    options = {"num_warps": constants.pop("num_warps")}
    if kernel in ("quantise", "gelu"):
        types = {"x": "*bf16", **QUANTISED}
        return compiled(_quantise_kernel, types, constants | {"GELU": kernel == "gelu"}, arch, options)
    types = {**dict.fromkeys(("x", "weight", "bias", "total"), "*bf16"), **QUANTISED, "epsilon": "fp32"}
    added = {"branch": "*bf16"} if kernel == "add" else {}
    constants |= {"ADD": kernel == "add"} | ({} if added else {"branch": None})
    return compiled(_normalise_kernel, types | added, constants, arch, options)


@pytest.mark.parametrize("channels", [192, 768, 1024, 1280, 3072, 4096, 5120])
@pytest.mark.parametrize("kernel", ["quantise", "gelu", "normalise", "add"])
def test_kernel_reads_16_bytes_at_once_and_rounds_in_hardware(kernel: str, channels: int, tmp_path: Path):
    binary = compile_kernel(kernel, channels)
    ptx = binary.asm["ptx"]
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx
    assert set(re.findall(r"ld\.global\S*", ptx)) == {"ld.global.v4.b32"}
    used = registers(binary, tmp_path)
    assert used.get("REG", 0) <= REGISTERS
    assert used.get("STACK", 0) == used.get("LOCAL", 0) == 0


def test_ampere_has_no_e4m3():
    """Which is why the rung asks for compute capability 8.9."""
    with pytest.raises(CompilationError, match="fp8e4nv not supported"):
        compile_kernel("quantise", 768, arch=80)
