"""One attention layer of the encoder on random inputs, and what it ought to give."""

from dataclasses import dataclass

import torch

from splitsam.kernels.relpos_global import global_attention, global_attention_reference, launch_global_attention
from splitsam.kernels.relpos_window import (
    WINDOW,
    launch_window_attention,
    window_attention,
    window_attention_reference,
)
from splitsam.kernels.tiles import Tile

GRID = (64, 64)
TOKENS = GRID[0] * GRID[1]
MODELS = {"ViT-B": (12, 64), "ViT-H": (16, 80)}
KINDS = ("global", "window")
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Inputs:
    """One attention layer: qkv [B, 4096, 3, heads, d], its bias [3, heads, d] and the two tables."""

    kind: str
    qkv: torch.Tensor
    bias: torch.Tensor
    rel_pos_h: torch.Tensor
    rel_pos_w: torch.Tensor

    @property
    def scale(self) -> float:
        return float(self.qkv.shape[-1] ** -0.5)

    def reference(self, image: int, dtype: torch.dtype) -> torch.Tensor:
        """[1, 4096, heads * d] of one image, by the PyTorch reference in this dtype."""
        qkv, bias, h, w = (
            t.to(dtype) for t in (self.qkv[image : image + 1], self.bias, self.rel_pos_h, self.rel_pos_w)
        )
        if self.kind == "global":
            return global_attention_reference(qkv, h, w, GRID, self.scale)
        return window_attention_reference(qkv, bias, h, w, GRID, self.scale)

    def launch(self, tile: Tile) -> torch.Tensor:
        if self.kind == "global":
            return launch_global_attention(self.qkv, self.rel_pos_h, self.rel_pos_w, GRID, self.scale, tile)
        return launch_window_attention(self.qkv, self.bias, self.rel_pos_h, self.rel_pos_w, GRID, self.scale, tile)

    def operator(self) -> torch.Tensor:
        """As the encoder calls it, with the tile that is installed."""
        out: torch.Tensor
        if self.kind == "global":
            out = global_attention(self.qkv, self.rel_pos_h, self.rel_pos_w, *GRID, self.scale)
        else:
            out = window_attention(self.qkv, self.bias, self.rel_pos_h, self.rel_pos_w, *GRID, self.scale)
        return out


def make_inputs(kind: str, heads: int, d: int, batch: int) -> Inputs:
    side = GRID[0] if kind == "global" else WINDOW
    generator = torch.Generator("cuda").manual_seed(batch)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return (std * torch.randn(shape, device="cuda", generator=generator)).to(DTYPE)

    tables = (normal(2 * side - 1, d, std=0.2), normal(2 * side - 1, d, std=0.2))
    return Inputs(kind, normal(batch, TOKENS, 3, heads, d), normal(3, heads, d), *tables)
