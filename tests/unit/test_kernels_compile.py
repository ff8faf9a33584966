"""The kernels compiled for an A100 (sm_80) and an H100 (sm_90) at production tiles, without either."""

import json
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")

from kernel_compiling import SHARED_BYTES, TRITON_TYPES, compiled, overwritten_too_soon, registers, serialised
from triton.compiler.errors import CompilationError

from splitsam.kernels import tiles
from splitsam.kernels.arguments import head_parts
from splitsam.kernels.relpos_global import _global_kernel
from splitsam.kernels.relpos_hopper_64 import hopper_64_kernel
from splitsam.kernels.relpos_hopper_80 import hopper_80_kernel
from splitsam.kernels.relpos_window import _window_kernel

HEADS = {64: 12, 80: 16}


def compile_global(tile: tiles.Tile, d: int, dtype: str, arch: int, out: str = ""):
    d0, d1 = head_parts(d)
    pointers = dict.fromkeys(("qkv", "rel_pos_h", "rel_pos_w"), f"*{dtype}") | {"out": f"*{out or dtype}"}
    types = pointers | {"scratch": "*fp32", "scale_log2": "fp32", "stride_batch": "i32", "stride_token": "i32"}
    constants: dict[str, object] = {"HEADS": HEADS[d], "GH": 64, "GW": 64, "D0": d0, "D1": d1}
    constants |= {"TABLE_H": 128, "TABLE_W": 128, "SCRATCH_COLUMNS": 64, "BLOCK_N": 64}
    constants |= {"BLOCK_M": tile.block_m, "TMA": tile.tma, "wanted": None}
    for name, width in (("pairs0", d0), ("pairs1", d1)):
        if tile.tma and width:
            types[name] = f"tensordesc<{dtype}[64, {width}]>"
        else:
            constants[name] = None
    return compiled(_global_kernel, types, constants, arch, tile.launch_options())


def compile_64(out: str = "bf16"):
    return compile_hopper(hopper_64_kernel, dict.fromkeys(("queries", "rows", "tables_h", "tables_w"), (64, 64)), out)


def compile_80(out: str = "bf16"):
    rows = {"queries": 64, "pairs": 128, "tables_h": 64, "tables_w": 128}
    parts = {f"{source}{i}": (rows[source], width) for source in rows for i, width in enumerate((64, 16))}
    return compile_hopper(hopper_80_kernel, parts, out)


def compile_hopper(kernel, sources: dict[str, tuple[int, int]], out: str):
    """With [rows, width] of each source's descriptor, at the installed tile."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    d = 64 if kernel is hopper_64_kernel else 80
    tile = tiles.lookup_tile("NVIDIA H100 80GB HBM3", f"global {d} bfloat16", 16)
    assert tile.overlap
    types = {"scratch": "*fp32", "out": f"*{out}", "flags": "*i32", "scale_log2": "fp32"}
    for name, (rows, width) in sources.items():
        types[name] = f"tensordesc<bf16[{rows}, {width}],{NVMMASharedLayout(2 * width, 16)}>"
    constants = {"HEADS": HEADS[d], "GH": 64, "STAGES": tile.num_stages}
    return compiled(kernel, types, constants, 90, {"num_warps": tile.num_warps})


def compile_window(tile: tiles.Tile, d: int, dtype: str, arch: int, out: str = ""):
    d0, d1 = head_parts(d)
    pointers = dict.fromkeys(("qkv", "qkv_bias", "rel_pos_h", "rel_pos_w"), f"*{dtype}") | {"out": f"*{out or dtype}"}
    numbers = {"scale_log2": "fp32", "inverse_scale": "fp32", "stride_batch": "i32", "stride_token": "i32"}
    constants = {"HEADS": HEADS[d], "GH": 64, "GW": 64, "SIDE": 14, "D0": d0, "D1": d1, "BLOCK_M": tile.block_m}
    return compiled(_window_kernel, pointers | numbers, constants, arch, tile.launch_options())


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("d", [64, 80])
@pytest.mark.parametrize("kernel", ["global", "window"])
def test_default_tile_compiles_to_matrix_instructions(
    kernel: str, d: int, dtype: str, arch: int, tmp_path: Path
) -> None:
    tile = tiles.lookup_tile("a GPU nobody has tuned", f"{kernel} {d} {dtype}", 1)
    binary = {"global": compile_global, "window": compile_window}[kernel](tile, d, TRITON_TYPES[dtype], arch)
    assert ("wgmma.mma_async" if arch == 90 else "mma.sync") in binary.asm["ptx"]
    assert binary.metadata.shared <= SHARED_BYTES[arch]
    used = registers(binary, tmp_path)
    print(f"{kernel} {d} {dtype} sm_{arch}: shared {binary.metadata.shared}, {used}")
    # A few spilled registers outside the inner loop are cheap; kilobytes would mean a tile that does not fit.
    assert used.get("STACK", 0) <= 512
    assert not overwritten_too_soon(binary)


@pytest.mark.parametrize("d", [64, 80])
def test_global_kernel_loads_through_descriptors_on_hopper(d: int) -> None:
    binary = compile_global(tiles.Tile(128, 8, 3, tma=True), d, "bf16", 90)
    assert "cp.async.bulk.tensor" in binary.asm["ptx"]
    assert binary.metadata.shared <= SHARED_BYTES[90]


@pytest.mark.parametrize(
    ("compile_kernel", "d", "tile"),
    [
        (compile_global, 64, tiles.Tile(128, 8, 2, tma=True, max_registers=128)),  # what is computed again
        (compile_global, 80, tiles.Tile(64, 4, 2, tma=True, max_registers=128)),
        (compile_window, 64, tiles.Tile(64, 4, 2)),
        (compile_window, 80, tiles.Tile(64, 4, 1)),
    ],
)
def test_output_in_e4m3_saturates_on_hopper_and_is_refused_on_an_a100(compile_kernel, d: int, tile) -> None:
    binary = compile_kernel(tile, d, "bf16", 90, "fp8e4nv")
    assert "cvt.rn.satfinite.e4m3x2.f32" in binary.asm["ptx"]
    assert binary.metadata.shared <= SHARED_BYTES[90]
    with pytest.raises(CompilationError, match="fp8e4nv not supported"):
        compile_kernel(tile, d, "bf16", 80, "fp8e4nv")


@pytest.mark.parametrize("out", ["bf16", "fp8e4nv"])
@pytest.mark.parametrize("compile_kernel", [compile_64, compile_80])
def test_overlapping_kernel_multiplies_while_it_exponentiates_twice_on_a_multiprocessor(
    compile_kernel, out: str, tmp_path: Path
) -> None:
    binary = compile_kernel(out)
    assert ("cvt.rn.satfinite.e4m3x2.f32" in binary.asm["ptx"]) == (out == "fp8e4nv")
    used = registers(binary, tmp_path)
    print(f"shared {binary.metadata.shared}, {used}")
    assert used.get("STACK", 0) == 0
    assert not serialised(binary, tmp_path)
    # Two programs of four warps, each with the 1 KiB that is the driver's.
    assert 2 * (binary.metadata.shared + 1024) <= SHARED_BYTES[90] + 1024
    assert 2 * 128 * used.get("REG", 0) <= 65536


def test_every_installed_tile_is_well_formed() -> None:
    folder = Path(tiles.__file__).parent
    keys = {f"{k} {d} {dtype}" for k in ("global", "window") for d in (64, 80) for dtype in TRITON_TYPES}
    assert set(json.loads((folder / "default.json").read_text())) == keys
    for path in folder.glob("*.json"):
        for by_batch in json.loads(path.read_text()).values():
            assert all(
                isinstance(tiles.Tile(**tile), tiles.Tile) and int(batch) > 0 for batch, tile in by_batch.items()
            )


def test_tile_of_the_largest_batch_not_above_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = tiles.Tile(64, 4, 3), tiles.Tile(128, 8, 3)
    path = tiles.write_tiles("Some GPU", {"global 64 bfloat16": {8: large, 1: small}}, tmp_path)
    monkeypatch.setattr(tiles, "_read", lambda _: json.loads(path.read_text()))
    tiles.lookup_tile.cache_clear()
    found = [tiles.lookup_tile("Some GPU", "global 64 bfloat16", batch) for batch in (1, 7, 8, 16)]
    tiles.lookup_tile.cache_clear()
    assert found == [small, small, large, large]
