"""Where the decoder's kernels find a prompt's pixels: at an address of its own, or in a tensor of all prompts.

An address leads to rows shared by any number of prompts, wherever in memory they lie, so nothing is gathered first. It
is the caller's part to keep them alive and of the right form until the kernel is done.
"""

# ruff: noqa: N803 (constexpr names are Triton's)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import ctypes

import torch
import triton
import triton.language as tl

from .arguments import DTYPES

HEADS = 8
# What a program computes on at once. In fp32 twice the bytes must fit, and speed matters less.
PIXEL_TILES = {torch.float32: 16, torch.float16: 64, torch.bfloat16: 64}


@triton.jit
def prompt_base(sources, prompt, stride, like, ADDRESSED: tl.constexpr):
    """A pointer to the first pixel that a prompt sees, of the type of `like`."""
    if ADDRESSED:
        address = tl.multiple_of(tl.load(sources + prompt), 16)
        base = address.to(like.dtype, bitcast=True)
    else:
        base = sources + prompt.to(tl.int64) * stride
    return base


def check_sources(sources: torch.Tensor, like: torch.Tensor) -> bool:
    """Whether these are addresses.

    Raises:
        ValueError: neither int64 [P] nor contiguous [P, N, C] in the dtype of `like`, with P of `like`.
    """
    if len(sources) != len(like) or not sources.is_contiguous() or sources.device != like.device:
        raise ValueError(
            f"sources must be contiguous, of {len(like)} prompts on {like.device}, not {list(sources.shape)}"
        )
    if sources.ndim == 1 and sources.dtype == torch.int64:
        return True
    if sources.ndim != 3 or sources.dtype != like.dtype:
        raise ValueError(
            f"sources must be int64 [P] or {like.dtype} [P, N, C], not {sources.dtype} {list(sources.shape)}"
        )
    return False


def check_rows(name: str, rows: torch.Tensor, channels: int) -> None:
    """Raises ValueError unless `rows` is contiguous [P, 64 or 128, channels] of a dtype that has a kernel."""
    if rows.ndim != 3 or rows.shape[1] not in (64, 128) or rows.shape[2] != channels or not len(rows):
        raise ValueError(f"{name} must be [P, 64 or 128, {channels}], not {list(rows.shape)}")
    if rows.dtype not in DTYPES or not rows.is_contiguous():
        raise ValueError(f"{name} must be contiguous and of {', '.join(map(str, DTYPES))}, not {rows.dtype}")


def view_sources(sources: torch.Tensor, like: torch.Tensor, pixels: int, width: int) -> torch.Tensor:
    """[P, pixels, width] of what the kernel would read, for references; copies what lies at addresses on a CPU."""
    if sources.dtype != torch.int64:
        return sources
    size_bytes = pixels * width * like.element_size()
    rows = [
        torch.frombuffer(bytearray(ctypes.string_at(address, size_bytes)), dtype=like.dtype).view(pixels, width)
        for address in sources.tolist()
    ]
    return torch.stack(rows)
