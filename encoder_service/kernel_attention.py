"""The encoder's attention through this project's Triton kernels; a file of its own because it needs Triton."""

from typing import Any

from torch import Tensor

from splitsam.encoder_service.attention import RelPosAttention
from splitsam.kernels.arguments import HEAD_DIMS
from splitsam.kernels.relpos_global import global_attention
from splitsam.kernels.relpos_window import WINDOW, window_attention


class KernelAttention(RelPosAttention):
    """This project's kernels: position terms are made inside, and windows are read from the grid by index.

    Args:
        source: as of RelPosAttention.
        windowed: in windows of 14 x 14 tokens, or over the whole grid.

    Raises:
        ValueError: the kernels know no heads of this size, or no windows of this one.
    """

    def __init__(self, source: Any, windowed: bool):
        super().__init__(source)
        rows, head_dim = self.rel_pos_h.shape
        if head_dim not in HEAD_DIMS:
            raise ValueError(f"the kernels take heads of {' or '.join(map(str, HEAD_DIMS))} channels, not {head_dim}")
        if windowed and rows != 2 * WINDOW - 1:
            raise ValueError(f"the kernels take windows of {WINDOW} x {WINDOW} tokens, not of {(rows + 1) // 2}")
        self.windowed = windowed

    def attend(self, qkv: Tensor, height: int, width: int, float8: bool = False) -> Tensor:
        """[B, H * W, 3, heads, d] to [B, H * W, C], on request in e4m3."""
        tables = self.rel_pos_h, self.rel_pos_w
        out: Tensor
        if self.windowed:
            # What the layer makes of a padded token: with zeros in, its bias comes out.
            padding: Tensor = self.qkv.bias  # type: ignore[assignment]
            out = window_attention(qkv, padding.view(qkv.shape[2:]), *tables, height, width, self.scale, float8)
        else:
            out = global_attention(qkv, *tables, height, width, self.scale, float8)
        return out
