"""Masks of many prompts cut on the GPU at once; what reaches the host is their measures and run boundaries."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

# A mask of a picture at 1080p has one to four thousand boundaries; what exceeds the room is fetched as bits.
BOUNDARIES_PER_MASK = 4096
BITS_AT_ONCE = 256 * 2**20
TABLES_KEPT = 64
_WORD = 32


@dataclass(frozen=True)
class Cut:
    """Where logits become a mask.

    Args:
        threshold: of the mask.
        stability_offset: how far above and below it the two masks of the stability score are cut.
    """

    threshold: float = 0.0
    stability_offset: float = 1.0


@dataclass(frozen=True, eq=False)
class CutMask:
    """A mask of the upright image by its boundaries: about 10 kB at 1080p.

    Args:
        size: (height, width) in pixels.
        boundaries: int32, ascending positions y + x height of pixels that differ from the one before; the one before
            the first is outside.
        area_px: pixels inside.
        box: pixels x0, y0, x1, y1, the last two exclusive; None for an empty mask.
    """

    size: tuple[int, int]
    boundaries: npt.NDArray[np.int32]
    area_px: int
    box: tuple[int, int, int, int] | None
    stability_score: float

    def encode_rle(self) -> str:
        """COCO's compressed run lengths."""
        height, width = self.size
        runs = np.diff(self.boundaries, prepend=0, append=height * width)
        rle = coco_mask.frPyObjects({"counts": runs.astype(np.uint32), "size": [height, width]}, height, width)
        counts: bytes = rle["counts"]
        return counts.decode("ascii")

    def to_bitmap(self) -> npt.NDArray[np.uint8]:
        """[height, width] of 0 and 1."""
        height, width = self.size
        flat = np.zeros(height * width, np.uint8)
        edges = (
            np.append(self.boundaries, height * width).tolist()
            if len(self.boundaries) % 2
            else self.boundaries.tolist()
        )
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            flat[start:stop] = 1
        return np.asarray(cv2.transpose(flat.reshape(width, height)), np.uint8)


@dataclass(frozen=True, eq=False)
class Uncut:
    """Logits on the way to a mask.

    Args:
        logits: [256, 256] float32, contiguous, on the device.
        input_size: (height, width) of the resized image inside the padded 1024 x 1024 input.
        original_size: (height, width) of the upright image.
    """

    logits: Tensor
    input_size: tuple[int, int]
    original_size: tuple[int, int]
    cut: Cut


class Cutter:
    """Cuts masks on one device. One thread at a time may call it."""

    def __init__(self, device: torch.device):
        self._device = device
        self._tables: OrderedDict[tuple[int, int], Tensor] = OrderedDict()

    def cut(self, masks: Sequence[Uncut], boundaries_per_mask: int = BOUNDARIES_PER_MASK) -> list[CutMask]:
        """Each mask, in order; waits for the device once for each 256 MiB of bits."""
        return [mask for piece in _pieces(masks) for mask in self._cut(piece, boundaries_per_mask)]

    def _cut(self, masks: Sequence[Uncut], boundaries_per_mask: int) -> list[CutMask]:
        from splitsam.kernels.cut_masks import cut_masks  # Triton is on Linux alone

        sizes = [mask.original_size for mask in masks]
        words = [-(-height // _WORD) for height, _ in sizes]
        columns = np.cumsum([0, *(width for _, width in sizes)])
        starts = np.cumsum([0, *(width * count for (_, width), count in zip(sizes, words, strict=True))])
        bits = torch.empty(int(starts[-1]), dtype=torch.int32, device=self._device)
        tables = [self._find_tables(mask) for mask in masks]
        plan = np.array(
            [
                (
                    mask.logits.data_ptr(),
                    rows.data_ptr(),
                    cols.data_ptr(),
                    bits.data_ptr() + 4 * start,
                    first,
                    *size,
                    count,
                )
                for mask, (rows, cols), start, first, size, count in zip(
                    masks, tables, starts[:-1].tolist(), columns[:-1].tolist(), sizes, words, strict=True
                )
            ],
            np.int64,
        )
        thresholds = np.array([(mask.cut.threshold, mask.cut.stability_offset) for mask in masks], np.float32)
        found = cut_masks(self._upload(plan), self._upload(thresholds), sizes, boundaries_per_mask * len(masks))
        ends = found.ends[self._upload(columns[1:] - 1)]
        measures, last, boundaries = self._download(found.measures, ends, found.boundaries)
        made = []
        begin = 0
        for i, (size, end) in enumerate(zip(sizes, last.tolist(), strict=True)):
            if end <= len(boundaries):
                own = boundaries[begin:end].copy()
            else:
                own = _find_boundaries(bits[int(starts[i]) : int(starts[i + 1])].cpu().numpy(), size)
            made.append(_describe(size, own, measures[i].tolist()))
            begin = end
        return made

    def _find_tables(self, mask: Uncut) -> tuple[Tensor, Tensor]:
        rows, columns = (
            self._find_table(kept, length) for kept, length in zip(mask.input_size, mask.original_size, strict=True)
        )
        return rows, columns

    def _find_table(self, kept: int, length: int) -> Tensor:
        from splitsam.kernels.cut_masks import axis_taps

        table = self._tables.get((kept, length))
        if table is None:
            table = self._tables[kept, length] = self._upload(axis_taps(kept, length))
        self._tables.move_to_end((kept, length))
        while len(self._tables) > TABLES_KEPT:
            self._tables.popitem(last=False)
        return table

    def _upload(self, array: npt.NDArray[np.generic]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else tensor

    def _download(self, *tensors: Tensor) -> list[npt.NDArray[np.int32]]:
        if self._device.type != "cuda":
            return [tensor.numpy() for tensor in tensors]
        hosts = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
        for host, tensor in zip(hosts, tensors, strict=True):
            host.copy_(tensor, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's own lacks types
        done.record()
        done.synchronize()
        return [host.numpy() for host in hosts]


def _pieces(masks: Sequence[Uncut]) -> Iterator[Sequence[Uncut]]:
    """Runs of masks whose bits fit together."""
    start, size_bytes = 0, 0
    for i, mask in enumerate(masks):
        height, width = mask.original_size
        own_bytes = 4 * width * -(-height // _WORD)
        if i > start and size_bytes + own_bytes > BITS_AT_ONCE:
            yield masks[start:i]
            start, size_bytes = i, 0
        size_bytes += own_bytes
    if start < len(masks):
        yield masks[start:]


def _describe(size: tuple[int, int], boundaries: npt.NDArray[np.int32], measures: list[int]) -> CutMask:
    area, inner, outer, from_right, from_bottom, x1, y1, _ = measures
    box = (size[1] - from_right, size[0] - from_bottom, x1, y1) if area else None
    return CutMask(size, boundaries, area, box, inner / max(outer, 1))


def _find_boundaries(bits: npt.NDArray[np.int32], size: tuple[int, int]) -> npt.NDArray[np.int32]:
    """What the kernels would have said if there had been room."""
    height, width = size
    rows = np.unpackbits(bits.view(np.uint8).reshape(width, -1), axis=1, count=height, bitorder="little").ravel()
    found: npt.NDArray[np.int32] = np.flatnonzero(np.diff(rows, prepend=np.uint8(0))).astype(np.int32)
    return found
