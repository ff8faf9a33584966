"""Compiles kernels for GPUs that are not there."""

import re
import subprocess
from pathlib import Path

import triton

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
TRITON_TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def compiled(kernel, types: dict[str, str], constants: dict[str, object], arch: int, options: dict[str, int]):
    """As a launch would, with 16-byte alignment of pointers and strides."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = [i for i, name in enumerate(signature) if "*" in signature[name] or "stride" in name]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def registers(binary, folder: Path) -> dict[str, int]:
    """REG, STACK and so on, as cuobjdump reports them; empty where there is none."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return {}
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    report = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
