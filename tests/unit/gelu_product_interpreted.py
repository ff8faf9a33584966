"""Runs `gelu_product`'s kernel in Triton's CPU interpreter and prints, as JSON, its relative errors against float64.

The interpreter's own cast to e4m3 loses carries, so the kernel gives the numbers before it: the cast is the compiler's.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch.nn import functional as F

from splitsam.kernels.gelu_product import ProductTile, launch_gelu_product
from splitsam.kernels.quantise_rows import quantise_rows_reference

SHAPES = [(1, 16, 16), (70, 48, 160), (64, 96, 64)]
TILES = {
    "whole": ProductTile(32, 64, 32, parts=1, flatten=False),
    "halves": ProductTile(32, 64, 32),
    "tall": ProductTile(64, 32, 32),
}


def run(m: int, k: int, n: int, tile: ProductTile) -> dict[str, float]:
    torch.manual_seed(k)
    rows, row_scales = quantise_rows_reference(5 * torch.randn(m, k))
    weight, weight_scales = quantise_rows_reference(torch.randn(n, k))
    bias = torch.randn(n)
    dequantised = weight.double() * weight_scales.double()
    out_scale = torch.tensor([0.37])
    arguments = (rows, row_scales, weight, weight_scales.t().contiguous(), bias, out_scale)
    out, scales = launch_gelu_product(*arguments, tile=tile, dtype=torch.float32)
    expected = F.gelu((rows.double() * row_scales.double()) @ dequantised.t() + bias.double(), approximate="tanh")
    difference = (out.double() * scales.double() - expected).abs().max()
    return {"values": float(difference / expected.abs().max()), "scales": float((scales - out_scale).abs().max())}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({f"{name} {m}x{k}x{n}": run(m, k, n, tile) for m, k, n in SHAPES for name, tile in TILES.items()}))
