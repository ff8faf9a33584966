"""Everything mode: a grid of points over an image, in pieces that clicks overtake, and the best of the masks found.

search:    for each piece of the grid: decode on the bulk lane; meanwhile sift what the piece before gave
compare:   once all points have been looked at, drop doubles; remove small regions, drop doubles again
answer:    write each mask that is left, best first
"""

import asyncio
import dataclasses
import math
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar, TypeVarTuple

import numpy as np
import numpy.typing as npt
import torch

from splitsam.common.batcher import Batcher, Lane
from splitsam.common.device_guard import DeviceGuard
from splitsam.common.errors import CacheUnavailable, ReplyTooLarge
from splitsam.common.records import RecordHeader
from splitsam.decoder_service.candidates import (
    Candidate,
    Thresholds,
    drop_doubles,
    drop_doubles_after_changes,
    sift,
    tidy,
)
from splitsam.decoder_service.embeddings import EmbeddingStore
from splitsam.decoder_service.masks import Mask, write_cut_mask, write_mask
from splitsam.decoder_service.messages import ReplyBudget, fixed_bytes
from splitsam.decoder_service.model import PromptLogits
from splitsam.decoder_service.packing import ImageJob
from splitsam.decoder_service.prompts import MaskFormat, OutputOptions, Prompt, Selection
from splitsam.decoder_service.refinements import RefinementStore

# Noise in an image of 64 megapixels weighs 8 MB a mask; masks of real pictures a few kB.
MAX_CANDIDATE_BYTES = 256 * 2**20
Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class EverythingRequest:
    """One `GenerateMasks` request.

    Args:
        grid: [N, 2] float64 points (x, y) as fractions of the image's width and height.
        points_per_batch: points in one piece, if fewer than the server decodes at once.
    """

    embedding_key: str
    grid: npt.NDArray[np.float64]
    points_per_batch: int | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)
    output: OutputOptions = field(default_factory=OutputOptions)


@dataclass(frozen=True, eq=False)
class FoundMask:
    """One mask of everything mode.

    Args:
        point: the grid point it came from, pixels (x, y) of the upright image.
        size: (height, width) of the upright image in pixels.
    """

    mask: Mask
    point: tuple[float, float]
    size: tuple[int, int]


def build_point_grid(points_per_side: int) -> npt.NDArray[np.float64]:
    """Evenly spaced points (x, y) in fractions of the image, row by row: [points_per_side ** 2, 2] float64."""
    offset = 1 / (2 * points_per_side)
    along = np.linspace(offset, 1 - offset, points_per_side)
    x, y = np.meshgrid(along, along)
    return np.stack([x, y], axis=-1).reshape(-1, 2)


class Everything:
    """Finds the masks of whole images, for all callers.

    Args:
        batcher: shared with the clicks, which it serves first.
        piece_points: most points in one piece, so that a click waits for no more than these.
        threads: that sift and write masks, other ones than those of clicks.
    """

    def __init__(
        self,
        batcher: Batcher[ImageJob, list[PromptLogits]],
        embeddings: EmbeddingStore,
        refinements: RefinementStore,
        guard: DeviceGuard,
        *,
        piece_points: int,
        threads: int,
        max_reply_bytes: int,
    ):
        self._batcher = batcher
        self._embeddings = embeddings
        self._refinements = refinements
        self._guard = guard
        self._piece_points = piece_points
        self._max_reply_bytes = max_reply_bytes
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="splitsam-everything")

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def generate(
        self, tenant: str, request: EverythingRequest, deadline_s: float | None
    ) -> AsyncGenerator[FoundMask, None]:
        """The masks of an image, highest predicted IoU first; closing the iterator ends the work for them.

        Args:
            deadline_s: when the caller gives up, in seconds of time.monotonic(); None if it never does.

        Raises:
            EmbeddingExpired, ModelMismatch, CacheUnavailable: as `EmbeddingStore.get` raises them.
            QueueFull, DeadlineTooShort, NotReady: as the batcher raises them.
            ReplyTooLarge: a mask would not fit into one message, or the masks found not into memory.
        """
        embedding = await self._embeddings.get(tenant, bytes.fromhex(request.embedding_key))
        header = embedding.header
        job = ImageJob(
            embedding=embedding.prepared,
            original_size=header.image_size.rows_columns,
            input_size=header.input_size.rows_columns,
            prompts=(),
            selection=Selection.ALL,
            cut=request.thresholds.cut(request.output.mask_threshold),
        )
        if fixed_bytes(request.output.formats, job.original_size) > self._max_reply_bytes:
            raise ReplyTooLarge(f"BITS of this image exceed the {self._max_reply_bytes} bytes of a reply; ask for RLE")
        candidates = await self._search(tenant, job, request, deadline_s)
        for candidate in await self._compare(candidates, job, request.thresholds):
            mask = await self._write(tenant, header, job, candidate, request.output, deadline_s)
            yield FoundMask(mask, candidate.point, job.original_size)

    async def _search(
        self, tenant: str, job: ImageJob, request: EverythingRequest, deadline_s: float | None
    ) -> list[Candidate]:
        """All masks that reach the thresholds, in the order of the grid."""
        height, width = job.original_size
        points = [(float(x), float(y)) for x, y in request.grid * (width, height)]
        step = min(request.points_per_batch or self._piece_points, self._piece_points)
        pieces = [points[start : start + step] for start in range(0, len(points), step)]
        found: list[Candidate] = []
        upcoming = asyncio.create_task(self._decode(tenant, job, pieces[0], deadline_s, begun=False))
        try:
            for number, piece in enumerate(pieces, start=1):
                answers = await upcoming
                if number < len(pieces):
                    upcoming = asyncio.create_task(self._decode(tenant, job, pieces[number], deadline_s))
                for point, answer in zip(piece, answers, strict=True):
                    found += await self._on_thread(
                        sift, answer, job, point, request.thresholds, request.output.mask_threshold
                    )
                if sum(candidate.size_bytes for candidate in found) > MAX_CANDIDATE_BYTES:
                    raise ReplyTooLarge(
                        f"the masks found take more than {MAX_CANDIDATE_BYTES} bytes; raise the thresholds"
                    )
        finally:
            upcoming.cancel()
            await asyncio.gather(upcoming, return_exceptions=True)
        return found

    async def _compare(
        self, candidates: Sequence[Candidate], job: ImageJob, thresholds: Thresholds
    ) -> Sequence[Candidate]:
        """The candidates that are left, highest predicted IoU first."""
        scores = [candidate.predicted_iou for candidate in candidates]
        kept = await self._on_thread(drop_doubles, candidates, scores, thresholds.box_nms)
        if not thresholds.min_region_area_px:
            return kept
        tidied = [
            await self._on_thread(tidy, candidate, job.original_size, thresholds.min_region_area_px)
            for candidate in kept
        ]
        return await self._on_thread(drop_doubles_after_changes, kept, tidied, thresholds)

    async def _write(
        self,
        tenant: str,
        header: RecordHeader,
        job: ImageJob,
        candidate: Candidate,
        output: OutputOptions,
        deadline_s: float | None,
    ) -> Mask:
        """One mask in the formats asked for; logits are not kept during the search but decoded again."""
        logits = None
        if output.refinement_tokens or MaskFormat.LOW_RES_LOGITS in output.formats:
            [answer] = await self._decode(tenant, job, [candidate.point], deadline_s)
            row = answer.logits[answer.mask_indices.index(candidate.mask_index)]
            logits = await self._on_thread(row.cpu)
        mask = await self._on_thread(write_candidate, candidate, job.original_size, output, logits)
        ReplyBudget(self._max_reply_bytes).spend(mask)
        if not output.refinement_tokens or logits is None:
            return mask
        try:
            token = await self._refinements.save(tenant, header, candidate.mask_index, logits)
        except CacheUnavailable:
            return mask
        return dataclasses.replace(mask, refinement_token=token)

    async def _decode(
        self,
        tenant: str,
        job: ImageJob,
        points: Sequence[tuple[float, float]],
        deadline_s: float | None,
        begun: bool = True,
    ) -> list[PromptLogits]:
        """All three masks of each point, from the bulk lane."""
        prompts = tuple(Prompt(np.array([point], np.float32), np.ones(1, np.int64)) for point in points)
        served = await self._batcher.submit(
            dataclasses.replace(job, prompts=prompts),
            deadline_s=math.inf if deadline_s is None else deadline_s,
            lane=Lane.BULK,
            tenant=tenant,
            begun=begun,
        )
        return served.value

    async def _on_thread(self, function: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        def work() -> Result:
            with self._guard.watch():
                return function(*arguments)

        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def write_candidate(
    candidate: Candidate, size: tuple[int, int], output: OutputOptions, logits: torch.Tensor | None
) -> Mask:
    """A candidate of an image of (height, width) in the formats asked for."""
    index, iou = candidate.mask_index, candidate.predicted_iou
    if candidate.cut is not None:
        return write_cut_mask(candidate.cut, output, mask_index=index, predicted_iou=iou, logits=logits)
    return write_mask(
        candidate.to_bitmap(size),
        output,
        mask_index=index,
        predicted_iou=iou,
        stability_score=candidate.stability_score,
        logits=logits,
    )
