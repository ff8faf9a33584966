"""What the kernels of the encoder ask of their arguments."""

from collections.abc import Sequence

import torch
import triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# A tile side is a power of two: a head of 80 is computed as 64 + 16.
_HEAD_PARTS = {64: (64, 0), 80: (64, 16)}
HEAD_DIMS = tuple(_HEAD_PARTS)
MAX_CHANNELS = 8192


def has_no_kernel(device: torch.device) -> bool:
    """On a CPU kernels run in Triton's interpreter alone; elsewhere there the operators compute their references."""
    return device.type == "cpu" and not triton.knobs.runtime.interpret


def head_parts(head_dim: int) -> tuple[int, int]:
    """The powers of two that a head is computed in, the second 0 where one does."""
    return _HEAD_PARTS[head_dim]


def check_qkv(qkv: torch.Tensor, grid_h: int, grid_w: int) -> None:
    """Raises ValueError unless `qkv` is [B, grid_h * grid_w, 3, heads, 64 or 80], its last three dimensions packed."""
    if qkv.ndim != 5 or qkv.shape[2] != 3 or qkv.shape[4] not in _HEAD_PARTS:
        raise ValueError(f"qkv must be [B, tokens, 3, heads, d] with d of {list(HEAD_DIMS)}, not {list(qkv.shape)}")
    if qkv.shape[1] != grid_h * grid_w or 0 in qkv.shape:
        raise ValueError(f"qkv has {qkv.shape[1]} tokens in {qkv.shape[0]} images for a grid of {grid_h} x {grid_w}")
    if qkv.dtype not in DTYPES:
        raise ValueError(f"qkv must be of {', '.join(map(str, DTYPES))}, not {qkv.dtype}")
    heads, d = qkv.shape[3:]
    if qkv.stride()[2:] != (heads * d, d, 1):
        raise ValueError(f"q, k, v, their heads and channels must follow each other, not at strides {qkv.stride()[2:]}")
    if any(stride % 8 for stride in qkv.stride()[:2]) or qkv.data_ptr() % 16:
        raise ValueError("every token of qkv must start at a multiple of 8 elements and of 16 bytes")


def check_table(name: str, table: torch.Tensor, qkv: torch.Tensor, shape: Sequence[int]) -> None:
    """Raises ValueError unless `table` is contiguous, of this shape, and like `qkv` in dtype and device."""
    if table.shape != torch.Size(shape):
        raise ValueError(f"{name} must be {list(shape)}, not {list(table.shape)}")
    if table.dtype != qkv.dtype or table.device != qkv.device:
        raise ValueError(f"{name} is {table.dtype} on {table.device}, qkv {qkv.dtype} on {qkv.device}")
    if not table.is_contiguous():
        raise ValueError(f"{name} must be contiguous, not at strides {table.stride()}")


def check_scale(scale: float) -> None:
    """Raises ValueError unless `scale` is positive and finite: a kernel divides by it and takes maxima before it."""
    if not 0.0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite, not {scale}")


def check_rows(name: str, x: torch.Tensor) -> None:
    """Raises ValueError unless `x` is [M, C], contiguous, in floating point, with a C that 8-bit products take."""
    if x.ndim != 2 or 0 in x.shape or x.shape[1] % 16 or x.shape[1] > MAX_CHANNELS:
        raise ValueError(f"{name} must be [M, C], C a multiple of 16 up to {MAX_CHANNELS}, not {list(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} must be of {', '.join(map(str, DTYPES))}, not {x.dtype}")
    if not x.is_contiguous() or x.data_ptr() % 16:
        raise ValueError(f"{name} must be contiguous from a multiple of 16 bytes on, not at strides {x.stride()}")
