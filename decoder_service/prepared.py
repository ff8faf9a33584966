"""An embedding as the mask decoder reads it, made once and kept beside it on the device.

What the first layer of the transformer makes of an image does not depend on the prompt: its keys, its values and the
queries of its pixels. A row holds these of one pixel behind the pixel itself, so that one address leads to all four.

    [ pixel 256 | key 128 | value 128 | query 128 ]
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from splitsam.common.sam_modules import TwoWayTransformer
from splitsam.common.shapes import EMBEDDING_SHAPE

CHANNELS, GRID, _ = EMBEDDING_SHAPE
PIXELS = GRID * GRID
INNER = CHANNELS // 2  # channels inside the attention between tokens and pixels
COLUMNS = CHANNELS + 3 * INNER


@dataclass(frozen=True, eq=False)
class PreparedEmbedding:
    """One source: an image embedding plus a dense prompt embedding, and what the first layer makes of it.

    Args:
        rows: [4096, 640] in the precision of the decoder, on its device; contiguous.
    """

    rows: Tensor

    @property
    def pixels(self) -> Tensor:
        """[4096, 256]."""
        return self.rows[:, :CHANNELS]

    @property
    def keys(self) -> Tensor:
        """[4096, 128], of the attention from tokens to pixels."""
        return self.rows[:, CHANNELS : CHANNELS + INNER]

    @property
    def values(self) -> Tensor:
        """[4096, 128], of the attention from tokens to pixels."""
        return self.rows[:, CHANNELS + INNER : CHANNELS + 2 * INNER]

    @property
    def queries(self) -> Tensor:
        """[4096, 128], of the attention from pixels to tokens."""
        return self.rows[:, CHANNELS + 2 * INNER :]

    @property
    def size_bytes(self) -> int:
        return self.rows.nbytes


def prepare_rows(transformer: TwoWayTransformer, pixels: Tensor, positions: Tensor) -> Tensor:
    """The rows of S sources: [S, 4096, 640].

    Args:
        pixels: [S, 4096, 256], image and dense prompt embedding added up.
        positions: [4096, 256], encoded.
    """
    reading, writing = transformer.layers[0].cross_attn_token_to_image, transformer.layers[0].cross_attn_image_to_token
    located = pixels + positions
    rows = pixels.new_empty(*pixels.shape[:2], COLUMNS)
    rows[..., :CHANNELS] = pixels
    sides = ((reading.k_proj, located), (reading.v_proj, pixels), (writing.q_proj, located))
    for i, (projection, side) in enumerate(sides):
        start = CHANNELS + i * INNER
        rows[..., start : start + INNER] = F.linear(side, projection.weight, projection.bias)
    return rows
