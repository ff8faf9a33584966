"""Runs the row kernels in Triton's CPU interpreter and prints, as JSON, their relative errors against float64.

The interpreter's own cast to e4m3 loses carries, so kernels give the numbers before it: the cast is the compiler's.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch.nn import functional as F

from splitsam.kernels.normalise_rows import launch_normalise_rows
from splitsam.kernels.quantise_rows import launch_quantise_rows

SHAPES = [(1, 16), (3, 48), (7, 192), (2, 1280)]
EPSILON = 1e-6


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference in parts of the row's largest number; of a row of zeros the largest number itself."""
    largest = expected.abs().amax(1, keepdim=True)
    return float(((actual.double() - expected).abs() / torch.where(largest > 0, largest, 1)).max())


def quantised_errors(out: torch.Tensor, scales: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """Of the numbers, their scales and the largest magnitude, which is to be e4m3's."""
    return {
        "values": error(out * scales, expected),
        "scales": float(
            (scales.double() * 448 / expected.abs().amax(1, keepdim=True).clamp(min=448e-12) - 1).abs().max()
        ),
        "largest": float(out.abs().max()),
    }


def run(rows: int, channels: int, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    torch.manual_seed(channels)
    x, branch = ((5 * torch.randn(rows, channels)).to(dtype) for _ in range(2))
    weight, bias = torch.randn(channels).to(dtype), torch.randn(channels).to(dtype)
    zeroed = x.clone()
    zeroed[-1] = 0
    total = x + branch
    found = {}
    for name, gelu, rounded in (("quantise", False, zeroed), ("gelu", True, x)):
        expected = F.gelu(rounded.double(), approximate="tanh") if gelu else rounded.double()
        found[name] = quantised_errors(*launch_quantise_rows(rounded, gelu, torch.float32), expected)
    for name, other, summed in (("normalise", None, x), ("add", branch, total)):
        kept, *quantised = launch_normalise_rows(x, other, weight, bias, EPSILON, torch.float32)
        expected = F.layer_norm(summed.double(), (channels,), weight.double(), bias.double(), EPSILON)
        found[name] = quantised_errors(*quantised, expected) | {"sum": error(kept, summed.double())}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(
        json.dumps(
            {
                f"{name} {rows}x{channels} {str(dtype).removeprefix('torch.')}": errors
                for rows, channels in SHAPES
                for dtype in (torch.float32, torch.float16)
                for name, errors in run(rows, channels, dtype).items()
            }
        )
    )
