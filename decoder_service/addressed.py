"""`Pixels` for a GPU: the same function through kernels that find each prompt's image by its address.

No pixel of an image is copied or repeated, whatever images a batch is made of, and every launch depends on the numbers
of prompts and tokens alone, so a CUDA graph can hold them all. Prompts are filled up to 8 or 16 tokens; fillers read,
but nothing reads them, and they weigh nothing where they would write.
"""

from typing import Any

from torch import Tensor

from splitsam.decoder_service.pixels import (
    HEADS,
    block_diagonal,
    from_pixel_side,
    head_scale,
    split_heads,
    to_pixel_side,
)
from splitsam.decoder_service.prepared import CHANNELS, COLUMNS, INNER, PIXELS

TOKEN_COUNTS = (8, 16)  # of the outputs, the prompt and fillers together; the kernels take rows by 64, of 8 heads


class AddressedPixels:
    """The pixels that P prompts of 8 or of 16 tokens see.

    Args:
        addresses: [P] int64, of `PreparedEmbedding.rows`, which the caller keeps alive.
        positions: [4096, 256], encoded.
        barred: [P, T] float32, 0 for a token and -inf for a filler.
    """

    def __init__(self, addresses: Tensor, positions: Tensor, barred: Tensor):
        self._addresses, self._positions = addresses, positions
        self.barred = barred
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

        queries = attention.q_proj(tokens)
        queries = queries * head_scale(queries)
        if self._own is None:
            rows = block_diagonal(queries)
            mixed = read_pixels(rows, self._addresses, None, CHANNELS, CHANNELS + INNER, PIXELS, COLUMNS)
            joined = _diagonal(mixed)
        else:
            rows = to_pixel_side(queries, attention.k_proj.weight)
            mixed = read_pixels(rows, self._own, self._positions, 0, 0, PIXELS, CHANNELS)
            joined = from_pixel_side(mixed, attention.v_proj)
        output: Tensor = attention.out_proj(joined)
        return output

    def write(self, attention: Any, norm: Any, tokens: Tensor, values: Tensor) -> None:
        """As `Pixels.write`."""
        from splitsam.kernels.write_pixels import write_pixels

        keys = attention.k_proj(tokens)
        keys = keys * head_scale(keys)
        written = to_pixel_side(attention.v_proj(values), attention.out_proj.weight.mT)
        written = written + attention.out_proj.bias / HEADS
        constants = self.barred[:, None].expand(-1, HEADS, -1)
        if self._own is None:
            rows, sources, positions = block_diagonal(keys), self._addresses, None
            query_column, width = CHANNELS + 2 * INNER, COLUMNS
        else:
            rows, sources, positions = to_pixel_side(keys, attention.q_proj.weight), self._own, self._positions
            query_column, width = 0, CHANNELS
            biased = split_heads(keys).float() @ attention.q_proj.bias.float().view(HEADS, -1, 1)
            constants = constants + biased.squeeze(-1)
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


def _diagonal(mixed: Tensor) -> Tensor:
    """Of [P, 8 T, 128] each head's own channels: [P, T, 128]."""
    prompts, rows, channels = mixed.shape
    blocks = mixed.view(prompts, HEADS, rows // HEADS, HEADS, channels // HEADS).diagonal(dim1=1, dim2=3)
    return blocks.permute(0, 1, 3, 2).reshape(prompts, rows // HEADS, channels)
