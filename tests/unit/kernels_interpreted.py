"""Runs the attention kernels in Triton's CPU interpreter and prints, as JSON, their errors against float32.

A program of its own: the interpreter is chosen when Triton is imported, and the compile tests need the other kind.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from splitsam.kernels.relpos_global import (
    _launch,
    global_attention,
    global_attention_reference,
    launch_global_attention,
)
from splitsam.kernels.relpos_window import window_attention, window_attention_reference
from splitsam.kernels.tiles import Tile

# Name: kernel, (batch, grid height, grid width, heads, head dim). Batch 1 and 2, odd and partial grids, every head dim.
CASES = {
    "global square": ("global", (1, 14, 14, 2, 64)),
    "global batch": ("global", (2, 8, 8, 2, 80)),
    "global odd": ("global", (1, 5, 7, 1, 80)),
    "global production row": ("global", (1, 3, 64, 1, 64)),
    "global tall": ("global", (1, 33, 2, 1, 64)),
    "global one token": ("global", (1, 1, 1, 1, 64)),
    "global descriptors": ("global tma", (2, 3, 16, 2, 80)),
    "window exact": ("window", (1, 14, 14, 1, 64)),
    "window padded": ("window", (1, 16, 16, 2, 64)),
    "window padded batch": ("window", (2, 16, 15, 1, 80)),
    "window smaller grid": ("window", (1, 5, 9, 1, 80)),
}


def spaced(values: torch.Tensor) -> torch.Tensor:
    """The same values with room between tokens and between images, as a slice of something larger has."""
    batch, tokens = values.shape[:2]
    room = values.new_full((batch, tokens + 1, 4, *values.shape[3:]), float("nan"))
    room[:, :tokens, :3] = values
    return room[:, :tokens, :3]


def errors(kernel: str, shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> dict[str, float]:
    """Largest errors of the kernel, and of PyTorch in the same dtype, against PyTorch in float32."""
    batch, gh, gw, heads, d = shape
    torch.manual_seed(sum(shape))
    sides = (14, 14) if kernel == "window" else (gh, gw)
    qkv, bias = torch.randn(batch, gh * gw, 3, heads, d), torch.randn(3, heads, d)
    tables = [0.3 * torch.randn(2 * side - 1, d) for side in sides]
    inputs = [qkv, bias, *tables] if kernel == "window" else [qkv, *tables]
    inputs = [tensor.to(dtype) for tensor in inputs]
    reference = window_attention_reference if kernel == "window" else global_attention_reference
    expected = reference(*[tensor.float() for tensor in inputs], (gh, gw), d**-0.5)
    same_dtype = reference(*inputs, (gh, gw), d**-0.5)
    if kernel == "global tma":
        actual = launch_global_attention(*inputs, (gh, gw), d**-0.5, Tile(32, 4, 1, tma=True))
    else:
        inputs[0] = spaced(inputs[0])
        operator = window_attention if kernel == "window" else global_attention
        actual = operator(*inputs, gh, gw, d**-0.5)
    return {
        "kernel": float((actual - expected).abs().max()),
        "pytorch": float((same_dtype - expected).abs().max()),
        "largest": float(expected.abs().max()),
    }


def recomputed() -> dict[str, float]:
    """Errors of the query tiles that the global kernel is asked for, and what it left of the others, which were 7."""
    torch.manual_seed(3)
    inputs = [torch.randn(2, 48, 3, 2, 64), torch.randn(5, 64), torch.randn(31, 64)]
    wanted = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0], dtype=torch.int32).view(2, 2, 2)  # [B, heads, query tiles]
    out = _launch(*inputs, (3, 16), 0.125, Tile(32, 4, 1, tma=True), torch.full((2, 48, 128), 7.0), wanted)
    expected = global_attention_reference(*inputs, (3, 16), 0.125)
    chosen = wanted.bool().repeat_interleave(32, 2)[..., :48].transpose(1, 2).repeat_interleave(64, 2)
    return {
        "wanted": float((out - expected)[chosen].abs().max()),
        "others": float((out[~chosen] - 7).abs().max()),
        "largest": float(expected.abs().max()),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(
        json.dumps(
            {
                f"{name} {str(dtype).removeprefix('torch.')}": errors(kernel, shape, dtype)
                for name, (kernel, shape) in CASES.items()
                for dtype in (torch.float32, torch.float16)
            }
            | {"recomputed": recomputed()}
        )
    )
