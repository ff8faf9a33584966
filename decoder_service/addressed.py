"""`Pixels` for a GPU: the same function through kernels that find each prompt's image by its address.

No pixel of an image is copied or repeated, whatever images a batch is made of, and every launch depends on the numbers
of prompts and tokens alone, so a CUDA graph can hold them all. The rows of a head are filled up to 8 or 16 tokens;
those that were added read but are dropped, and weigh nothing where they would write.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from splitsam.decoder_service.pixels import (
    HEADS,
    MOST_ABSORBED_TOKENS,
    block_diagonal,
    from_pixel_side,
    head_scale,
    split_heads,
    to_pixel_side,
)
from splitsam.decoder_service.prepared import CHANNELS, COLUMNS, INNER, PIXELS


class AddressedPixels:
    """The pixels that P prompts of at most 16 tokens see.

    Args:
        addresses: [P] int64, of `PreparedEmbedding.rows`, which the caller keeps alive.
        positions: [4096, 256], encoded.
    """

    def __init__(self, addresses: Tensor, positions: Tensor):
        self._addresses, self._positions = addresses, positions
        self._own: Tensor | None = None

    @property
    def own(self) -> Tensor:
        """[P, 4096, 256], once written to."""
        if self._own is None:
            raise RuntimeError("no prompt has written to its pixels yet")
        return self._own

    def read(self, attention: Any, tokens: Tensor) -> Tensor:
        """As `Pixels.read`."""
        from splitsam.kernels.read_pixels import read_pixels  # Triton is on Linux alone

        count = tokens.shape[1]
        queries = attention.q_proj(tokens)
        queries = _fill_up(queries * head_scale(queries))
        if self._own is None:
            rows = block_diagonal(queries)
            mixed = read_pixels(rows, self._addresses, None, CHANNELS, CHANNELS + INNER, PIXELS, COLUMNS)
            joined = _diagonal(mixed)
        else:
            rows = to_pixel_side(queries, attention.k_proj.weight)
            mixed = read_pixels(rows, self._own, self._positions, 0, 0, PIXELS, CHANNELS)
            joined = from_pixel_side(mixed, attention.v_proj)
        output: Tensor = attention.out_proj(joined[:, :count])
        return output

    def write(self, attention: Any, norm: Any, tokens: Tensor, values: Tensor) -> None:
        """As `Pixels.write`."""
        from splitsam.kernels.write_pixels import write_pixels

        count = tokens.shape[1]
        keys = attention.k_proj(tokens)
        keys = _fill_up(keys * head_scale(keys))
        written = to_pixel_side(_fill_up(attention.v_proj(values)), attention.out_proj.weight.mT)
        written = written + attention.out_proj.bias / HEADS
        constants = keys.new_zeros(len(keys), HEADS, keys.shape[1], dtype=torch.float32)
        if self._own is None:
            rows, sources, positions = block_diagonal(keys), self._addresses, None
            query_column, width = CHANNELS + 2 * INNER, COLUMNS
        else:
            rows, sources, positions = to_pixel_side(keys, attention.q_proj.weight), self._own, self._positions
            query_column, width = 0, CHANNELS
            constants += (split_heads(keys).float() @ attention.q_proj.bias.float().view(HEADS, -1, 1)).squeeze(-1)
        constants[..., count:] = float("-inf")
        self._own = write_pixels(
            rows,
            constants.flatten(1),
            written,
            sources,
            positions,
            norm.weight,
            norm.bias,
            norm.eps,
            query_column,
            PIXELS,
            width,
        )


def _fill_up(tokens: Tensor) -> Tensor:
    """[P, T, C] with zeros to the next of 8 and 16 tokens."""
    missing = -tokens.shape[1] % (MOST_ABSORBED_TOKENS // 2)
    return F.pad(tokens, (0, 0, 0, missing)) if missing else tokens


def _diagonal(mixed: Tensor) -> Tensor:
    """Of [P, 8 T, 128] each head's own channels: [P, T, 128]."""
    prompts, rows, channels = mixed.shape
    blocks = mixed.view(prompts, HEADS, rows // HEADS, HEADS, channels // HEADS).diagonal(dim1=1, dim2=3)
    return blocks.permute(0, 1, 3, 2).reshape(prompts, rows // HEADS, channels)
