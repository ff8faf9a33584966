"""Which masks of a tile are cut on the GPU, and whose they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from splitsam.common.shapes import LOW_RES_SIDE_PX
from splitsam.common.transfers import Steps
from splitsam.decoder_service.cutting import Canvas, Cut, CutMask, Cutter
from splitsam.decoder_service.packing import ImageJob, Tile

_LOGITS_BYTES = 4 * LOW_RES_SIDE_PX**2


@dataclass(frozen=True, eq=False)
class CutPlan:
    """What J jobs want to have cut.

    Args:
        cutter: that does it.
        asked: [J], whether they want anything.
        floors: [J], the predicted IoU that a mask has to exceed; None where every mask is wanted, so that cutting need
            not wait for scores.
        canvases: of the jobs.
    """

    cutter: Cutter
    asked: npt.NDArray[np.bool_]
    floors: npt.NDArray[np.float64] | None
    canvases: Sequence[Canvas]

    @classmethod
    def of(cls, jobs: Sequence[ImageJob], cutter: Cutter | None) -> "CutPlan | None":
        """None where no job wants anything, or there is no cutter."""
        asked = np.array([job.cut is not None for job in jobs], np.bool_)
        if cutter is None or not asked.any():
            return None
        least = [job.cut.above_iou if job.cut is not None else None for job in jobs]
        floors = np.array([-np.inf if floor is None else floor for floor in least])
        canvases = [Canvas(job.input_size, job.original_size, job.cut or Cut()) for job in jobs]
        return cls(cutter, asked, floors if any(floor is not None for floor in least) else None, canvases)

    def begin(self, tile: Tile, logits: Tensor, scores: npt.NDArray[Any] | None) -> "TileCut":
        """Have the device cut what is wanted of a tile.

        Args:
            logits: [P, K, 256, 256] float32 on the device, contiguous, which the caller keeps.
            scores: [P, K, 2], mask token and predicted IoU; needed for floors.
        """
        jobs = np.array([job for job, _ in tile.owners], np.int64)
        width = tile.wanted.shape[1]
        needed = self.asked[jobs][:, None] & (np.arange(width) < tile.counts[:, None])
        if scores is not None and self.floors is not None:
            needed &= ~(scores[..., 1] <= self.floors[jobs][:, None])
        places = np.flatnonzero(needed)
        steps = self.cutter.begin(logits.data_ptr() + _LOGITS_BYTES * places, jobs[places // width], self.canvases)
        return TileCut(tile.counts, self.asked[jobs], needed, steps)


@dataclass(frozen=True, eq=False)
class TileCut:
    """Masks of a tile's P prompts that are being cut.

    Args:
        counts: [P], masks that were asked for.
        asked: [P], whether any is to be cut.
        needed: [P, K], which.
    """

    counts: npt.NDArray[np.int64]
    asked: npt.NDArray[np.bool_]
    needed: npt.NDArray[np.bool_]
    steps: Steps[list[CutMask]]

    def masks(self) -> Steps[list[tuple[CutMask | None, ...] | None]]:
        """For each prompt its masks, None in place of those that are not needed; None where nothing was asked."""
        made = iter((yield from self.steps))
        rows = zip(self.needed.tolist(), self.counts.tolist(), self.asked.tolist(), strict=True)
        return [
            tuple(next(made) if need else None for need in row[:count]) if asked else None for row, count, asked in rows
        ]
