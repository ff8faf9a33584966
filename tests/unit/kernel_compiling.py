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
    from triton.experimental.gluon._runtime import GluonASTSource

    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = [i for i, name in enumerate(signature) if "*" in signature[name] or "stride" in name]
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(
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


def serialised(binary, folder: Path) -> bool:
    """Whether the assembler waits for each of Hopper's products, as it does where it cannot tell when one is read."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    source = folder / "kernel.ptx"
    source.write_text(binary.asm["ptx"])
    command = [tool, "-v", "--gpu-name=sm_90a", source, "-o", folder / "kernel.out"]
    return "serialized" in subprocess.run(command, capture_output=True, text=True, check=True).stderr


def overwritten_too_soon(binary) -> list[str]:
    """Buffers of one stage into which a loop copies what comes next while a matrix product may still read them.

    Triton 3.6 and 3.7 do so to an operand that is also loaded into registers. Only Hopper's products read on their own.
    """
    found, stages, source, in_flight = [], {}, {}, []
    for line in binary.asm["ttgir"].splitlines():
        if made := re.search(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x", line):
            stages[made[1]] = int(made[2])
        elif view := re.search(r"(%\w+) = ttg\.memdesc_\w+ (%\w+)", line):
            source[view[1]] = source.get(view[2], view[2])
        elif product := re.search(r"warp_group_dot (%[\w#]+), (%[\w#]+),.*isAsync = true", line):
            in_flight.append({source.get(side, side) for side in product.groups()})
        elif wait := re.search(r"warp_group_dot_wait .*pendings = (\d+)", line):
            in_flight = in_flight[len(in_flight) - int(wait[1]) :]
        elif copy := re.search(r"async_copy_global_to_local \S+ (%\w+)", line):
            target = source.get(copy[1], copy[1])
            if stages.get(target) == 1 and any(target in read for read in in_flight):
                found.append(target)
    return found
