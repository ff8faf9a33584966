"""Where everything mode looks closer: the image cut into ever smaller crops that overlap.

Source: `generate_crop_boxes` and `is_box_near_crop_edge` in `utils.amg` of segment_anything.
"""

import itertools
import math
from dataclasses import dataclass

from splitsam.common.errors import InvalidArgument
from splitsam.common.keys import Crop

# A box that ends this close to where a crop was cut is taken for a part of something larger.
EDGE_PX = 20
DEFAULT_OVERLAP_RATIO = 512 / 1500


@dataclass(frozen=True)
class View:
    """A part of an image that is searched.

    Args:
        box: pixels x0, y0, x1, y1 of the upright image, the last two exclusive.
        layer: 0 for the whole image, n for one of 2^n by 2^n crops.
    """

    box: Crop
    layer: int

    @property
    def crop(self) -> Crop | None:
        """None for the whole image."""
        return self.box if self.layer else None

    @property
    def area_px(self) -> int:
        x0, y0, x1, y1 = self.box
        return (x1 - x0) * (y1 - y0)

    def cuts_off(self, box: Crop, size: tuple[int, int]) -> bool:
        """Whether something in this view ends where the view does and the image of (height, width) goes on.

        Args:
            box: x0, y0, x1, y1 in pixels of this view, the last two exclusive.
        """
        left, top = self.box[:2]
        # As in segment_anything a box reaches to its last pixel, and a crop to the one after.
        ends = (left + box[0], top + box[1], left + box[2] - 1, top + box[3] - 1)
        edges = zip(ends, self.box, (0, 0, size[1], size[0]), strict=True)
        return any(abs(edge - cut) <= EDGE_PX < abs(edge - end) for edge, cut, end in edges)


def cut_into_views(size: tuple[int, int], layers: int, overlap_ratio: float) -> list[View]:
    """The whole image of (height, width), then its crops layer by layer, column by column.

    Raises:
        InvalidArgument: the image is too small for that many layers.
    """
    height, width = size
    views = [View((0, 0, width, height), 0)]
    for layer in range(1, layers + 1):
        count = 2**layer
        overlap = int(overlap_ratio * min(size) * (2 / count))
        across, down = (math.ceil((overlap * (count - 1) + side) / count) for side in (width, height))
        for i, j in itertools.product(range(count), repeat=2):
            x0, y0 = (across - overlap) * i, (down - overlap) * j
            if x0 >= width or y0 >= height:
                raise InvalidArgument("crop_layers", f"{layer} layers leave crops of {width} x {height} pixels empty")
            views.append(View((x0, y0, min(x0 + across, width), min(y0 + down, height)), layer))
    return views
