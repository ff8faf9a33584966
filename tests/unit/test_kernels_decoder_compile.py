"""The decoder's kernels as the service launches them, compiled for an A100 and an H100 without either."""

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")

import torch
from kernel_compiling import SHARED_BYTES, TRITON_TYPES, compiled, overwritten_too_soon, registers

from splitsam.kernels.cut_masks import COLUMNS, GROUP, PATCH_COLUMNS, PATCH_ROWS, SLACK, _cut_kernel
from splitsam.kernels.encode_runs import BLOCK, MOST_CHARACTERS, _encode_kernel
from splitsam.kernels.paint_logits import _paint_kernel
from splitsam.kernels.pixel_sources import PIXEL_TILES
from splitsam.kernels.read_pixels import _join_kernel, _read_kernel
from splitsam.kernels.run_boundaries import _count_kernel, _place_kernel
from splitsam.kernels.write_pixels import _write_kernel

SHARED = {"ADDRESSED": True, "LOCATED": False, "D": 128, "WIDTH": 640}
OWN = {"ADDRESSED": False, "LOCATED": True, "D": 256, "WIDTH": 256}


def source_types(own: bool, dtype: str) -> dict[str, str]:
    return {"sources": f"*{dtype}", "positions": f"*{dtype}"} if own else {"sources": "*i64"}


def compile_read(dtype: str, own: bool, rows: int, shares: int, arch: int):
    short = TRITON_TYPES[dtype]
    types = dict.fromkeys(("rows", "out"), f"*{short}") | source_types(own, short) | {"stride_prompt": "i32"}
    types |= dict.fromkeys(("partial", "maxima", "sums"), "*fp32")
    constants = {"KEY": 0 if own else 256, "VALUE": 0 if own else 384, "N": 4096, "R": rows, "SHARES": shares}
    constants |= (OWN if own else SHARED | {"positions": None}) | {"BLOCK_R": 64}
    constants["BLOCK_N"] = min(32 if own else 64, PIXEL_TILES[getattr(torch, dtype)])
    return compiled(_read_kernel, types, constants, arch, {"num_warps": 4 if own else 8, "num_stages": 1})


def compile_join(dtype: str, own: bool, rows: int, shares: int, arch: int):
    types = dict.fromkeys(("partial", "maxima", "sums"), "*fp32") | {"out": f"*{TRITON_TYPES[dtype]}"}
    constants = {"R": rows, "D": 256 if own else 128, "SHARES": 32, "BLOCK_R": 4}
    return compiled(_join_kernel, types, constants, arch, {"num_warps": 4})


def compile_write(dtype: str, own: bool, rows: int, shares: int, arch: int):
    short = TRITON_TYPES[dtype]
    pointers = dict.fromkeys(("rows", "written", "norm_weight", "norm_bias", "out"), f"*{short}")
    types = pointers | source_types(own, short) | {"constants": "*fp32", "eps": "fp32", "stride_prompt": "i32"}
    constants = {"QUERY": 0 if own else 512, "N": 4096, "R": rows, "C": 256, "HEAD_COUNT": 8}
    constants |= OWN if own else SHARED | {"positions": None}
    constants["BLOCK_N"] = PIXEL_TILES[getattr(torch, dtype)]
    return compiled(_write_kernel, types, constants, arch, {"num_warps": 4 if arch == 90 else 8, "num_stages": 1})


def compile_paint(dtype: str, masks: int, arch: int):
    names = ("pixels", "weight1", "bias1", "norm_weight", "norm_bias", "weight2", "bias2")
    types = dict.fromkeys(names, f"*{TRITON_TYPES[dtype]}") | {"hyper": "*fp32", "out": "*fp32", "eps": "fp32"}
    constants = {"K": masks, "S": 64, "C": 256, "IN": 64, "OUT": 32, "TANH": dtype == "bfloat16"}
    return compiled(_paint_kernel, types, constants, arch, {"num_warps": 4, "num_stages": 1})


def check(name: str, binary, arch: int, folder: Path) -> None:
    used = registers(binary, folder)
    print(f"{name} sm_{arch}: shared {binary.metadata.shared}, {used}")
    assert binary.metadata.shared <= SHARED_BYTES[arch]
    # An H100's matrix unit reads one side from shared memory; an A100's takes both from registers, and some spill.
    assert used.get("STACK", 0) <= (256 if arch == 90 else 1536)
    assert not overwritten_too_soon(binary)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["bfloat16"])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kernel", [compile_read, compile_join, compile_write])
def test_kernel_between_tokens_and_pixels_fits_the_gpu(
    kernel, own: bool, dtype: str, arch: int, tmp_path: Path
) -> None:
    for rows in (64, 128):
        binary = kernel(dtype, own, rows, 1 if rows == 128 else 4, arch)
        check(f"{kernel.__name__} own={own} {rows} {dtype}", binary, arch, tmp_path)
        if dtype == "bfloat16" and kernel is not compile_join:
            assert ("wgmma.mma_async" if arch == 90 else "mma.sync") in binary.asm["ptx"]
            # A row is read 16 bytes at a time, from an address that came out of a tensor, too.
            assert "ld.global.v4" in binary.asm["ptx"] or "cp.async.cg.shared.global" in binary.asm["ptx"]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_painting_kernel_fits_the_gpu(dtype: str, arch: int, tmp_path: Path) -> None:
    for masks in (1, 3):
        binary = compile_paint(dtype, masks, arch)
        check(f"paint {masks} {dtype}", binary, arch, tmp_path)
        if dtype == "bfloat16":
            assert ("wgmma.mma_async" if arch == 90 else "mma.sync") in binary.asm["ptx"]


@pytest.mark.parametrize("arch", [80, 90])
def test_cutting_kernels_fit_the_gpu(arch: int, tmp_path: Path) -> None:
    types = {"plan": "*i64", "measures": "*i32"}
    constants = {"SIDE": 256, "WORD": 32, "COLUMNS": COLUMNS, "GROUP": GROUP, "PLAN": 9, "MEASURES": 8}
    constants |= {"PATCH_ROWS": PATCH_ROWS, "PATCH_COLUMNS": PATCH_COLUMNS, "SLACK": SLACK}
    check("cut", compiled(_cut_kernel, types, constants, arch, {"num_warps": 1}), arch, tmp_path)
    blocks = {"PLAN": 9, "BLOCK": 8, "WORDS": 64}
    types = {"plan": "*i64", "counts": "*i32", "measures": "*i32"}
    counting = compiled(_count_kernel, types, blocks | {"MEASURES": 8}, arch, {"num_warps": 4})
    check("count", counting, arch, tmp_path)
    types = {"plan": "*i64", "ends": "*i32", "boundaries": "*i32", "base": "i32", "room": "i32"}
    check("place", compiled(_place_kernel, types, blocks, arch, {"num_warps": 4}), arch, tmp_path)
    types |= {"measures": "*i32", "spans": "*i32", "text": "*u8", "cursor": "*i32"}
    constants = {"PLAN": 9, "MEASURES": 8, "BLOCK": BLOCK, "MOST": MOST_CHARACTERS}
    check("encode", compiled(_encode_kernel, types, constants, arch, {"num_warps": 4}), arch, tmp_path)
