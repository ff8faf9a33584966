"""Masks of many prompts cut on the GPU at once; what reaches the host is their measures and run lengths.

The few masks of a click go through a CUDA graph (`CutGraphs`), where one was captured; many, very large ones, and those
like noise, are cut launch by launch.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from splitsam.common.rle import decode_rle
from splitsam.common.transfers import Download, Steps, finish, upload
from splitsam.decoder_service.cut_graphs import (
    BOUNDARIES_OF_A_MASK,
    CHARACTERS_PER_RUN,
    CutGraphs,
    GraphAnswer,
    words_of,
)

if TYPE_CHECKING:
    from splitsam.kernels.encode_runs import EncodedRuns

BITS_AT_ONCE = 256 * 2**20
# Of 4 bytes, and 7 for their text; a mask of a picture at 1080p has one to ten thousand.
BOUNDARIES_AT_ONCE = 32 * 2**20
# As a rule there are no more, so run lengths are written without asking: 4 MiB of text at most.
BOUNDARIES_GUESSED = 2 * 2**20
TABLES_KEPT = 64
Size = tuple[int, int]


@dataclass(frozen=True)
class Cut:
    """Where logits become a mask.

    Args:
        threshold: of the mask.
        stability_offset: how far above and below it the two masks of the stability score are cut.
        above_iou: cut only masks whose predicted IoU is above this; None for all.
    """

    threshold: float = 0.0
    stability_offset: float = 1.0
    above_iou: float | None = None


@dataclass(frozen=True, eq=False)
class CutMask:
    """A mask of the upright image.

    Args:
        size: (height, width) in pixels.
        rle: COCO's compressed run lengths.
        area_px: pixels inside.
        box: pixels x0, y0, x1, y1, the last two exclusive; None for an empty mask.
    """

    size: Size
    rle: bytes
    area_px: int
    box: tuple[int, int, int, int] | None
    stability_score: float

    def to_bitmap(self) -> npt.NDArray[np.uint8]:
        """[height, width] of 0 and 1."""
        return decode_rle(self.size, self.rle.decode("ascii")).view(np.uint8)


@dataclass(frozen=True)
class Canvas:
    """Onto what the logits of an image are cut.

    Args:
        input_size: (height, width) of the resized image inside the padded 1024 x 1024 input.
        original_size: (height, width) of the upright image.
    """

    input_size: Size
    original_size: Size
    cut: Cut


@dataclass(frozen=True, eq=False)
class _Wanted:
    """M masks to cut.

    Args:
        addresses, canvas_of, canvases: of `Cutter.cut`.
        sizes: [M, 2], height and width of each mask.
    """

    addresses: npt.NDArray[np.int64]
    canvas_of: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    canvases: Sequence[Canvas]

    def __getitem__(self, piece: slice) -> "_Wanted":
        return _Wanted(self.addresses[piece], self.canvas_of[piece], self.sizes[piece], self.canvases)


class Cutter:
    """Cuts masks on one device. One thread at a time may call it."""

    def __init__(self, device: torch.device):
        self._device = device
        self._tables: OrderedDict[Size, Tensor] = OrderedDict()
        self._graphs: CutGraphs | None = None

    def capture(self) -> None:
        """Make CUDA graphs for few masks; without it they are cut launch by launch."""
        graphs = CutGraphs(self._device)
        graphs.capture()
        self._graphs = graphs

    def cut(
        self, addresses: npt.NDArray[np.int64], canvas_of: npt.NDArray[np.int64], canvases: Sequence[Canvas]
    ) -> list[CutMask]:
        """Each mask, in order.

        Args:
            addresses: [M], of logits [256, 256] float32, contiguous, on the device, which the caller keeps.
            canvas_of: [M], index of each mask's canvas.
        """
        return finish(self.begin(addresses, canvas_of, canvases), self._device)

    def begin(
        self, addresses: npt.NDArray[np.int64], canvas_of: npt.NDArray[np.int64], canvases: Sequence[Canvas]
    ) -> Steps[list[CutMask]]:
        """As `cut`, of which 256 MiB of bits are begun already when this returns.

        Waits for the device once for each such piece, and more often for masks like noise.
        """
        sizes = np.array([canvas.original_size for canvas in canvases], np.int64).reshape(-1, 2)[canvas_of]
        wanted = _Wanted(addresses, canvas_of, sizes, canvases)
        if self._graphs is not None and self._graphs.take(sizes):
            begun = self._graphs.begin(self._plan(wanted, self._graphs.bits))
            return _finish_few(begun, sizes, lambda: self._begin(wanted))
        return self._begin(wanted)

    def _begin(self, wanted: "_Wanted") -> Steps[list[CutMask]]:
        """The same, launch by launch."""
        bytes_of = 4 * words_of(wanted.sizes[:, 0]) * wanted.sizes[:, 1]
        pieces = (self._launch(wanted[piece]) for piece in _pieces(bytes_of, BITS_AT_ONCE))
        return _finish_pieces(next(pieces, None), pieces)

    def _launch(self, wanted: "_Wanted") -> "_Piece":
        sizes = wanted.sizes
        bits = torch.empty(int((words_of(sizes[:, 0]) * sizes[:, 1]).sum()), dtype=torch.int32, device=self._device)
        return _Piece(upload(self._plan(wanted, bits), self._device), sizes, bits)

    def _plan(self, wanted: "_Wanted", bits: Tensor) -> npt.NDArray[np.int64]:
        """What `cut_masks` takes, with the bits of all masks one after the other."""
        seen, canvas_of = np.unique(wanted.canvas_of, return_inverse=True)
        tables = [self._find_tables(wanted.canvases[i]) for i in seen]
        cuts = [wanted.canvases[i].cut for i in seen]
        limits = np.array([(cut.threshold, cut.stability_offset) for cut in cuts], np.float32)
        heights, widths = wanted.sizes.T
        words = words_of(heights)
        plan = np.empty((len(heights), 9), np.int64)
        plan[:, 0] = wanted.addresses
        plan[:, 1:3] = np.array([[table.data_ptr() for table in pair] for pair in tables])[canvas_of]
        plan[:, 3] = bits.data_ptr() + 4 * _begins(widths * words)[:-1]
        plan[:, 4] = _begins(widths)[:-1]
        plan[:, 5], plan[:, 6], plan[:, 7] = heights, widths, words
        plan[:, 8] = limits.view(np.int64)[canvas_of, 0]
        return plan

    def _find_tables(self, canvas: Canvas) -> tuple[Tensor, Tensor]:
        rows, columns = (
            self._find_table(kept, length) for kept, length in zip(canvas.input_size, canvas.original_size, strict=True)
        )
        return rows, columns

    def _find_table(self, kept: int, length: int) -> Tensor:
        from splitsam.kernels.cut_masks import axis_taps

        table = self._tables.get((kept, length))
        if table is None:
            table = self._tables[kept, length] = upload(axis_taps(kept, length), self._device)
        self._tables.move_to_end((kept, length))
        while len(self._tables) > TABLES_KEPT:
            self._tables.popitem(last=False)
        return table


class _Piece:
    """Masks that are cut launch by launch, the first of which have been made.

    Args:
        plan: of `cut_masks`; sizes: [M, 2], height and width of each mask.
        bits: that the plan points into.
    """

    def __init__(self, plan: Tensor, sizes: npt.NDArray[np.int64], bits: Tensor):
        from splitsam.kernels.cut_masks import cut_masks  # Triton is on Linux alone
        from splitsam.kernels.run_boundaries import count_boundaries

        self._plan, self._sizes, self._bits = plan, sizes, bits
        self._largest = (int(sizes[:, 0].max()), int(sizes[:, 1].max()))
        self._measured = cut_masks(plan, self._largest)
        self._ends = count_boundaries(plan, self._measured, self._largest, int(sizes[:, 1].sum()))
        self._room = min(BOUNDARIES_OF_A_MASK * len(sizes), BOUNDARIES_GUESSED)
        runs = self._encode(slice(0, len(sizes)), 0, self._room)
        self._guess = Download(self._measured, runs.spans, runs.text[: CHARACTERS_PER_RUN * self._room])

    def masks(self) -> Steps[list[CutMask]]:
        yield self._guess
        measures, spans, text = self._guess.wait()
        used_bytes = int(spans.sum(1).max())
        counts = measures[:, 7].astype(np.int64)
        if counts.sum() <= self._room and used_bytes <= len(text):
            return list(_describe(self._sizes, measures, spans, text[:used_bytes].tobytes()))
        made: list[CutMask] = []
        before = _begins(counts)
        for piece in _pieces(counts, BOUNDARIES_AT_ONCE):
            base = int(before[piece.start])
            runs = self._encode(piece, base, int(before[piece.stop]) - base)
            download = Download(runs.spans)
            yield download
            [spans] = download.wait()
            download = Download(runs.text[: int(spans.sum(1).max())])
            yield download
            [text] = download.wait()
            made += _describe(self._sizes[piece], measures[piece], spans, text.tobytes())
        return made

    def _encode(self, piece: slice, base: int, room: int) -> "EncodedRuns":
        from splitsam.kernels.encode_runs import encode_runs
        from splitsam.kernels.run_boundaries import place_boundaries

        plan = self._plan[piece]
        boundaries = place_boundaries(plan, self._ends, self._largest, base, room)
        return encode_runs(plan, self._measured[piece], self._ends, boundaries, base)


def _finish_few(
    begun: GraphAnswer, sizes: npt.NDArray[np.int64], again: Callable[[], Steps[list[CutMask]]]
) -> Steps[list[CutMask]]:
    """The masks that a graph has cut, or those of `again` where it had too little room for their runs."""
    yield begun.download
    found = begun.read(len(sizes))
    return (yield from again()) if found is None else list(_describe(sizes, *found))


def _finish_pieces(begun: _Piece | None, later: Iterator[_Piece]) -> Steps[list[CutMask]]:
    made: list[CutMask] = []
    while begun is not None:
        made += yield from begun.masks()
        begun = None  # its bits make room for the next
        begun = next(later, None)
    return made


def _begins(sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where each of things that follow one another begins, and the last one ends."""
    return np.concatenate([[0], np.cumsum(sizes)])


def _pieces(sizes: npt.NDArray[np.int64], at_once: int) -> Iterator[slice]:
    """Runs of things that fit together, and what exceeds the room alone."""
    ends = np.cumsum(sizes)
    start = 0
    while start < len(sizes):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + at_once, side="right")))
        yield slice(start, stop)
        start = stop


def _describe(
    sizes: npt.NDArray[np.int64], measures: npt.NDArray[np.int32], spans: npt.NDArray[np.int32], text: bytes
) -> Iterator[CutMask]:
    rows = zip(sizes.tolist(), measures.tolist(), spans.tolist(), strict=True)
    for (height, width), (area, inner, outer, from_right, from_bottom, x1, y1, _), (start, length) in rows:
        box = (width - from_right, height - from_bottom, x1, y1) if area else None
        yield CutMask((height, width), text[start : start + length], area, box, inner / max(outer, 1))
