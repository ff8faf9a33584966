"""The images that an encoder has in work, and how many of them come before another one."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from splitsam.common.batcher import Lane
from splitsam.common.keys import Crop
from splitsam.encoder_service.image_header import guess_pixels
from splitsam.encoder_service.model import EncoderImage

_UNIT_PIXELS = 1_000_000


@dataclass(frozen=True, eq=False)
class Upload:
    """An image file, the crop of it that is wanted, and its weight as of `hash_and_weigh`."""

    image: bytes
    crop: Crop | None
    weight: int


@dataclass(eq=False)
class Work:
    """An image in work.

    Args:
        lane: the first of all who wait for it.
        promoted_at_s: when it came into that lane from another, in seconds of time.monotonic().
        prepared: once it is decoded.
    """

    tenant: str
    lane: Lane
    upload: Upload
    promoted_at_s: float = -math.inf
    prepared: EncoderImage | None = None


def hash_and_weigh(image: bytes, max_pixels: int) -> tuple[bytes, int]:
    """The SHA-256 of an image file, and what decoding it costs: a part that each image does, and its megapixels.

    Args:
        max_pixels: above them it will not be decoded.
    """
    pixels = guess_pixels(image)
    return hashlib.sha256(image).digest(), 1 + (pixels // _UNIT_PIXELS if pixels <= max_pixels else 0)


def count_in_lanes(works: Iterable[Work], lane: Lane) -> int:
    """Images of a lane and of those before it."""
    return sum(work.lane <= lane for work in works)


def count_on_their_way(works: Iterable[Work], tenant: str, lane: Lane) -> int:
    """Images not decoded yet that the model will be given before another one, by lanes and tenants in turn."""
    counts = Counter((work.lane, work.tenant) for work in works if work.prepared is None)
    turns = counts[lane, tenant] + 1
    return sum(
        count if other_lane < lane or other == tenant else min(count, turns)
        for (other_lane, other), count in counts.items()
        if other_lane <= lane
    )
