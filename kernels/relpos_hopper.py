"""`relpos_global` for Hopper, bfloat16 and 64 tokens a row: products run while earlier scores are exponentiated.

Triton waits for every product right after starting it, so a warp either multiplies or exponentiates. In Gluon a program
says when to wait. A block is one image row of queries, and its scores with two rows of keys (or those of two blocks
with one row) take turns:

    start s_b                   | exponentials of a; wait for s_b
    start acc += p_a v_a, start the next s_a
                                | exponentials of b
    start acc += p_b v_b; wait for all but that

s_b is waited for before acc += p_a v_a is started, so that both starts may stand among exponentials.

    relpos_hopper_64    heads of 64: two blocks a program share each row of keys and values
    relpos_hopper_80    heads of 80, whose sums leave registers for one block: two rows of keys at a time

The softmax is optimistic: a query's scores are taken relative to their maximum in the first image row, once, in place
of a running maximum that every product of values would have to wait for. bfloat16 has the exponents of float32, so a
large p is as exact as a small one. A program with a sum above 2^60 sets its flag, and `relpos_global` computes that
tile again with the running maximum.
"""

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

wait_for_all = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.7 renamed it


def takes(qkv: torch.Tensor, grid: tuple[int, int]) -> bool:
    """Whether inputs are bfloat16, of 64 tokens a row, up to 64 rows in pairs, images in one matrix."""
    gh, gw = grid
    one_matrix = qkv.shape[0] == 1 or qkv.stride(0) == qkv.shape[1] * qkv.stride(1)
    plain = qkv.dtype == torch.bfloat16 and gw == 64 and gh % 2 == 0 and gh <= 64 and one_matrix
    return plain and not triton.knobs.runtime.interpret


def describe(values: torch.Tensor, rows: int, width: int) -> TensorDescriptor:
    """For [rows, width] of a matrix, swizzled as wide as they are."""
    return TensorDescriptor.from_tensor(values, [rows, width], gl.NVMMASharedLayout(2 * width, 16))
