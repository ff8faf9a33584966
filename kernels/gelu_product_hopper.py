"""`gelu_product` for Hopper: one warp copies, and two groups of four warps multiply and finish half a tile each.

    copying warp   | for every step of every tile: wait until a slot of the ring is free, copy rows and weights into it
    group 0, 1     | for every tile: multiply its 64 rows of every step, give slots back; then scale, GELU, e4m3, store

The groups share the weights of a slot but wait for nothing else of each other. Group 1 starts SKEW steps late, and so
one group multiplies at the full rate while the other finishes, as far as the ring has slots for what lies between them;
the copying warp goes on to the next tile meanwhile. Scales and bias of a tile's columns are loaded while it is
multiplied and read from shared memory: four warps are too few to hide what a load from further away would take.

A program stays on its multiprocessor and goes over tiles of the output. Those that run at the same time share rows and
weights in the second-level cache: GROUP tiles of rows with every tile of columns, one group after the other.
"""

# ruff: noqa: N803, N806
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .relpos_hopper import wait_for_all as wait_for_group

BLOCK_M = gl.constexpr(128)
BLOCK_N = gl.constexpr(256)
BLOCK_K = gl.constexpr(128)
STAGES = gl.constexpr(4)
SKEW = gl.constexpr(3)  # below STAGES
GROUP = gl.constexpr(8)  # tiles of rows
REGISTERS = gl.constexpr(240)  # of a thread that multiplies
COPYING_REGISTERS = gl.constexpr(24)


@gluon.jit
def _corner(tile, tiles_m, tiles_n):
    first_m = tile // (GROUP * tiles_n) * GROUP
    group = gl.minimum(tiles_m - first_m, GROUP)
    within = tile % (GROUP * tiles_n)
    return (first_m + within % group) * BLOCK_M, within // group * BLOCK_N


@gluon.jit
def _copy(rows, weight, a, b, ready, free, tiles_m, tiles_n, STEPS: gl.constexpr):
    step = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        m0, n0 = _corner(tile, tiles_m, tiles_n)
        for k in range(STEPS):
            slot = step % STAGES
            bar = ready.index(slot)
            mbarrier.wait(free.index(slot), (step // STAGES & 1) ^ 1)  # passes at once in the ring's first round
            mbarrier.expect(bar, (BLOCK_M + BLOCK_N) * BLOCK_K)
            tma.async_copy_global_to_shared(rows, [m0, k * BLOCK_K], bar, a.index(slot))
            tma.async_copy_global_to_shared(weight, [n0, k * BLOCK_K], bar, b.index(slot))
            step += 1


@gluon.jit
def _finish(
    acc, staged, columns, out, left, linear, cubic, m0, n0, START: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Scales half the columns of sums, to half of what is stored, and stores their GELU."""
    by_column: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    sums = gl.convert_layout(acc, LAYOUT) * left[:, None]
    right = columns.index(0).slice(START, BLOCK_N // 2).load(by_column)
    half = sums * right[None, :] + columns.index(1).slice(START, BLOCK_N // 2).load(by_column)[None, :]
    inner = half * (linear + cubic * (half * half))
    t = gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [inner], gl.float32, is_pure=True, pack=1)
    tma.store_wait(0)  # what was staged before has been read
    wait_for_group()
    staged.store((half + half * t).to(gl.float8e4nv))
    fence_async_shared()
    wait_for_group()
    tma.async_copy_shared_to_global(out, [m0, n0 + START], staged)


@gluon.jit
def _multiply(
    a, b, ready, free, started, staged, columns, out, row_scales, weight_scales, bias, out_scale, scales,
    M, tiles_m, tiles_n, HALF: gl.constexpr, STEPS: gl.constexpr,
):  # fmt: skip
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32])
    COLUMNS: gl.constexpr = gl.BlockedLayout([BLOCK_N // 128], [32], [4], [0])
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N // 2, 32])
    scale = gl.load(out_scale)
    per_half = 0.5 / scale
    linear = 0.7978845608 / per_half
    cubic = 0.0356774081 / (per_half * per_half * per_half)
    step = 0
    if HALF == 1:
        mbarrier.wait(started, 0)
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        m0, n0 = _corner(tile, tiles_m, tiles_n)
        m0 += 64 * HALF
        m = m0 + gl.arange(0, 64, gl.SliceLayout(1, PART))
        # Loaded while the group multiplies.
        left = gl.load(row_scales + m, mask=m < M, other=0.0)
        n = gl.arange(0, BLOCK_N, COLUMNS)
        right = gl.load(weight_scales + n0 + n)
        offsets = gl.load(bias + n0 + n)
        acc = gl.zeros([64, BLOCK_N], gl.float32, SUMS)
        for k in range(STEPS):
            slot = step % STAGES
            mbarrier.wait(ready.index(slot), step // STAGES & 1)
            part = a.index(slot).slice(64 * HALF, 64)
            acc = warpgroup_mma(part, b.index(slot).permute((1, 0)), acc, use_acc=k > 0, is_async=True)
            acc = warpgroup_mma_wait(1, [acc])
            wait_for_group()  # every warp has finished the step before
            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), pred=k > 0)
            if HALF == 0:
                mbarrier.arrive(started, pred=step == gl.minimum(SKEW, STEPS - 1))
            step += 1
        acc = warpgroup_mma_wait(0, [acc])
        wait_for_group()
        mbarrier.arrive(free.index((step + STAGES - 1) % STAGES))
        columns.index(0).store(right)
        columns.index(1).store(offsets.to(gl.float32) * per_half)
        left *= per_half
        wait_for_group()
        acc0, acc1 = acc.reshape([64, 2, BLOCK_N // 2]).permute([0, 2, 1]).split()
        _finish(acc0, staged, columns, out, left, linear, cubic, m0, n0, 0, PART)
        _finish(acc1, staged, columns, out, left, linear, cubic, m0, n0, BLOCK_N // 2, PART)
        gl.store(scales + m, gl.full([64], 1.0, gl.float32, gl.SliceLayout(1, PART)) * scale, mask=(m < M) & (n0 == 0))
    tma.store_wait(0)


@gluon.jit
def hopper_product_kernel(
    rows, weight, out, row_scales, weight_scales, bias, out_scale, scales, M, N, STEPS: gl.constexpr,
):  # fmt: skip
    WIDE: gl.constexpr = gl.NVMMASharedLayout(128, 8)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    a = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BLOCK_M, BLOCK_K], WIDE)
    b = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BLOCK_N, BLOCK_K], WIDE)
    staged0 = gl.allocate_shared_memory(gl.float8e4nv, [64, BLOCK_N // 2], WIDE)
    columns0 = gl.allocate_shared_memory(gl.float32, [2, BLOCK_N], PLAIN)
    staged1 = gl.allocate_shared_memory(gl.float8e4nv, [64, BLOCK_N // 2], WIDE)
    columns1 = gl.allocate_shared_memory(gl.float32, [2, BLOCK_N], PLAIN)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    started = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(free.index(slot), count=2)
    mbarrier.init(started, count=1)
    fence_async_shared()
    wait_for_group()
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_n = gl.cdiv(N, BLOCK_N)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    a, b, ready, free, started, staged0, columns0, out, row_scales, weight_scales, bias, out_scale,
                    scales, M, tiles_m, tiles_n, 0, STEPS,
                ),
            ),
            (
                _multiply,
                (
                    a, b, ready, free, started, staged1, columns1, out, row_scales, weight_scales, bias, out_scale,
                    scales, M, tiles_m, tiles_n, 1, STEPS,
                ),
            ),
            (_copy, (rows, weight, a, b, ready, free, tiles_m, tiles_n, STEPS)),
        ],
        [4, 1],
        [REGISTERS, COPYING_REGISTERS],
    )  # fmt: skip


def launch_hopper_product(
    rows: torch.Tensor,
    row_scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor,
    out_scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `gelu_product` returns, of arguments that have been checked, by as many programs as multiprocessors."""
    (m, k), n = rows.shape, len(weight)
    out, scales = rows.new_empty(m, n), torch.empty_like(row_scales)
    tiles = triton.cdiv(m, BLOCK_M.value) * triton.cdiv(n, BLOCK_N.value)
    programs = torch.cuda.get_device_properties(rows.device).multi_processor_count
    hopper_product_kernel[(min(tiles, programs),)](
        _descriptor(rows, BLOCK_M.value), _descriptor(weight, BLOCK_N.value), _descriptor(out, BLOCK_M.value // 2),
        row_scales, weight_scales, bias, out_scale, scales, m, n, STEPS=triton.cdiv(k, BLOCK_K.value), num_warps=4,
    )  # fmt: skip
    return out, scales


def _descriptor(values: torch.Tensor, rows: int) -> TensorDescriptor:
    """For [rows, 128] of a matrix, as wide as the swizzle."""
    return TensorDescriptor.from_tensor(values, [rows, 128], gl.NVMMASharedLayout(128, 8))
