"""Attention and patch embedding of the encoder with everything that depends on shapes alone worked out beforehand.

They take over the weights of `segment_anything`'s modules under their names, so a state dict stays what it was.

    x [B, H, W, C] -> qkv Linear -> attend -> [B, H * W, C] -> proj Linear -> [B, H, W, C]

`ProductAttention` and `SdpaAttention` see a window as an image of its own, as `segment_anything` cuts them;
`kernel_attention.KernelAttention` sees the whole grid and finds the windows itself, so its blocks neither cut nor pad.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RelPosAttention(nn.Module):
    """The Linear layers and position tables of an attention; a subclass says what happens between the layers.

    Args:
        source: `segment_anything`'s Attention with relative positions, or one of this file's.
    """

    # Modules themselves until the sparse rung puts its own in their place.
    qkv: nn.Module
    proj: nn.Module
    rel_pos_h: nn.Parameter
    rel_pos_w: nn.Parameter

    def __init__(self, source: Any):
        super().__init__()
        self.num_heads: int = source.num_heads
        self.scale: float = source.scale
        self.qkv, self.proj = source.qkv, source.proj
        self.rel_pos_h, self.rel_pos_w = source.rel_pos_h, source.rel_pos_w

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C]."""
        batch, height, width, channels = x.shape
        qkv = self.qkv(x).view(batch, height * width, 3, self.num_heads, channels // self.num_heads)
        out: Tensor = self.proj(self.attend(qkv, height, width)).view(x.shape)
        return out

    def attend(self, qkv: Tensor, height: int, width: int) -> Tensor:
        """[B, H * W, 3, heads, d] to [B, H * W, C]."""
        raise NotImplementedError


class ProductAttention(RelPosAttention):
    """The arithmetic of `segment_anything`; its tables are spread over queries and keys once, not in every call.

    `segment_anything` indexes them in every call with tensors made on the CPU, which a GPU has to wait for.
    """

    spread_h: Tensor  # [H, H, d]: of query row and key row
    spread_w: Tensor  # [W, W, d]

    def __init__(self, source: Any):
        super().__init__(source)
        for name, table in (("spread_h", self.rel_pos_h), ("spread_w", self.rel_pos_w)):
            positions = torch.arange((len(table) + 1) // 2, device=table.device)
            rows = positions[:, None] - positions[None, :] + len(positions) - 1
            self.register_buffer(name, table.detach()[rows], persistent=False)

    def attend(self, qkv: Tensor, height: int, width: int) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, H * W, d]
        scores = (q * self.scale) @ k.transpose(-2, -1) + self.bias(q, height, width)
        out: Tensor = scores.softmax(dim=-1) @ v
        return out.transpose(1, 2).flatten(2)

    def bias(self, q: Tensor, height: int, width: int) -> Tensor:
        """[B, heads, H * W, H * W]: q . row term + q . column term of every pair of tokens."""
        q = q.reshape(*q.shape[:2], height, width, -1)
        rel_h = torch.einsum("bnhwc,hkc->bnhwk", q, self.spread_h)
        rel_w = torch.einsum("bnhwc,wkc->bnhwk", q, self.spread_w)
        return (rel_h[..., :, None] + rel_w[..., None, :]).flatten(4).flatten(2, 3)


class SdpaAttention(ProductAttention):
    """`scaled_dot_product_attention` with the position terms as a dense mask."""

    def attend(self, qkv: Tensor, height: int, width: int) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias(q, height, width), scale=self.scale)
        return out.transpose(1, 2).flatten(2)


class PatchProduct(nn.Module):
    """`segment_anything`'s PatchEmbed as one matrix product, which takes images of any floating dtype.

    cuDNN's choice for this convolution in bf16 takes 4 ms for 16 images of an H100, the product a tenth of one.
    """

    def __init__(self, source: Any):
        super().__init__()
        self.proj: nn.Conv2d = source.proj

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, H / 16, W / 16, C]."""
        weight = self.proj.weight  # [C, 3, 16, 16]
        side = weight.shape[-1]
        patches = images.to(weight.dtype).unfold(2, side, side).unfold(3, side, side)  # [B, 3, H/16, W/16, 16, 16]
        return F.linear(patches.permute(0, 2, 3, 1, 4, 5).flatten(3), weight.flatten(1), self.proj.bias)
