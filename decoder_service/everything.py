"""Everything mode: a grid of points over an image, in pieces that clicks overtake, and the best of the masks found.

search:    for the whole image, then each crop of it, whose embedding is sought while the one before is searched:
           for each piece of its grid: decode on the bulk lane; meanwhile sift what the piece before gave
           drop what the crop's edge cuts off, and doubles
compare:   once all points have been looked at, drop doubles between crops; remove small regions, drop doubles again
answer:    write each mask that is left, best first
"""

import asyncio
import dataclasses
import math
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar, TypeVarTuple

import numpy as np
import torch

from splitsam.common.batcher import Batcher, Lane
from splitsam.common.device_guard import DeviceGuard
from splitsam.common.errors import ReplyTooLarge
from splitsam.decoder_service.candidates import (
    Candidate,
    Thresholds,
    drop_doubles,
    drop_doubles_after_changes,
    place,
    sift,
    tidy,
)
from splitsam.decoder_service.crops import View, cut_into_views
from splitsam.decoder_service.embeddings import Embedding
from splitsam.decoder_service.everything_request import EverythingRequest, FoundMask
from splitsam.decoder_service.masks import Mask, write_cut_mask, write_mask
from splitsam.decoder_service.messages import ReplyBudget, fixed_bytes
from splitsam.decoder_service.model import PromptLogits
from splitsam.decoder_service.packing import ImageJob
from splitsam.decoder_service.prompts import MaskFormat, OutputOptions, Prompt, Selection
from splitsam.decoder_service.refinements import RefinementStore
from splitsam.decoder_service.sources import Source

# Noise in an image of 64 megapixels weighs 8 MB a mask; masks of real pictures a few kB.
MAX_CANDIDATE_BYTES = 256 * 2**20
Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Search:
    """One request in work.

    Args:
        deadline_s: when the caller gives up, in seconds of time.monotonic(); None if it never does.
    """

    tenant: str
    source: Source
    request: EverythingRequest
    deadline_s: float | None

    def job(self, embedding: Embedding) -> ImageJob:
        """An image or a crop, without prompts."""
        return ImageJob(
            embedding=embedding.prepared,
            original_size=embedding.header.image_size.rows_columns,
            input_size=embedding.header.input_size.rows_columns,
            prompts=(),
            selection=Selection.ALL,
            cut=self.request.thresholds.cut(self.request.output.mask_threshold),
        )


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
        refinements: RefinementStore,
        guard: DeviceGuard,
        *,
        piece_points: int,
        threads: int,
        max_reply_bytes: int,
    ):
        self._batcher = batcher
        self._refinements = refinements
        self._guard = guard
        self._piece_points = piece_points
        self._max_reply_bytes = max_reply_bytes
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="splitsam-everything")

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def generate(
        self, tenant: str, source: Source, request: EverythingRequest, deadline_s: float | None
    ) -> AsyncGenerator[FoundMask, None]:
        """The masks of an image, highest predicted IoU first; closing the iterator ends the work for them.

        Args:
            deadline_s: when the caller gives up, in seconds of time.monotonic(); None if it never does.

        Raises:
            InvalidArgument: the image is too small for the layers of crops.
            EmbeddingExpired and others: as `Source.embedding` raises them.
            QueueFull, DeadlineTooShort, NotReady: as the batcher raises them.
            ReplyTooLarge: a mask would not fit into one message, or the masks found not into memory.
        """
        search = Search(tenant, source, request, deadline_s)
        embedding = await source.embedding(None)
        size = embedding.header.image_size.rows_columns
        if fixed_bytes(request.output.formats, size) > self._max_reply_bytes:
            raise ReplyTooLarge(f"BITS of this image exceed the {self._max_reply_bytes} bytes of a reply; ask for RLE")
        views = cut_into_views(size, len(request.grids) - 1, request.overlap_ratio)
        keys: dict[View, str] = {}
        candidates = await self._search(search, views, embedding, keys)
        for candidate in await self._compare(candidates, size, request.thresholds):
            mask = await self._write(search, candidate, size)
            yield FoundMask(mask, candidate.point, size, candidate.view.box, keys[candidate.view])

    async def _search(
        self, search: Search, views: Sequence[View], embedding: Embedding, keys: dict[View, str]
    ) -> list[Candidate]:
        """The masks of all views that reach the thresholds, without doubles inside a view.

        Args:
            embedding: of the first view.
            keys: is filled with the key of each view's.
        """
        found: list[Candidate] = []
        size = embedding.header.image_size.rows_columns
        upcoming: asyncio.Task[Embedding] | None = None
        try:
            for number, view in enumerate(views, start=1):
                if upcoming is not None:
                    embedding = await upcoming
                if number < len(views):
                    upcoming = asyncio.create_task(search.source.embedding(views[number].crop))
                keys[view] = embedding.header.address.key.hex()
                of_view = await self._search_view(search, search.job(embedding), view, has_begun=number > 1)
                whole = [one for one in of_view if not view.cuts_off(one.box, size)]
                scores = [one.predicted_iou for one in whole]
                kept = await self._on_thread(drop_doubles, whole, scores, search.request.thresholds.box_nms)
                found += kept if view.crop is None else [await self._on_thread(place, one) for one in kept]
                _check_memory(found)
        finally:
            if upcoming is not None:
                upcoming.cancel()
                await asyncio.gather(upcoming, return_exceptions=True)
        return found

    async def _search_view(self, search: Search, job: ImageJob, view: View, has_begun: bool) -> list[Candidate]:
        """All masks of a view that reach the thresholds, in the order of its grid and its own coordinates."""
        request = search.request
        height, width = job.original_size
        points = [(float(x), float(y)) for x, y in request.grids[view.layer] * (width, height)]
        step = min(request.points_per_batch or self._piece_points, self._piece_points)
        pieces = [points[start : start + step] for start in range(0, len(points), step)]
        found: list[Candidate] = []
        upcoming = asyncio.create_task(self._decode(search, job, pieces[0], begun=has_begun))
        try:
            for number, piece in enumerate(pieces, start=1):
                answers = await upcoming
                if number < len(pieces):
                    upcoming = asyncio.create_task(self._decode(search, job, pieces[number]))
                found += await self._on_thread(_sift_piece, answers, job, view, piece, request)
                _check_memory(found)
        finally:
            upcoming.cancel()
            await asyncio.gather(upcoming, return_exceptions=True)
        return found

    async def _compare(
        self, candidates: Sequence[Candidate], size: tuple[int, int], thresholds: Thresholds
    ) -> Sequence[Candidate]:
        """The candidates that are left, highest predicted IoU first."""
        kept = candidates
        if any(candidate.view.crop for candidate in candidates):
            scores = [1 / candidate.view.area_px for candidate in candidates]  # smaller crops see more
            kept = await self._on_thread(drop_doubles, candidates, scores, thresholds.crop_nms)
        if thresholds.min_region_area_px:
            tidied = [await self._on_thread(tidy, one, size, thresholds.min_region_area_px) for one in kept]
            kept = await self._on_thread(drop_doubles_after_changes, kept, tidied, thresholds)
        return sorted(kept, key=lambda one: one.predicted_iou, reverse=True)

    async def _write(self, search: Search, candidate: Candidate, size: tuple[int, int]) -> Mask:
        """One mask in the formats asked for; logits are not kept during the search but decoded again."""
        output, view = search.request.output, candidate.view
        if not output.refinement_tokens and MaskFormat.LOW_RES_LOGITS not in output.formats:
            return await self._write_with(None, candidate, size, output)
        embedding = await search.source.embedding(view.crop)
        x, y = candidate.point
        [answer] = await self._decode(search, search.job(embedding), [(x - view.box[0], y - view.box[1])])
        row = answer.logits[answer.mask_indices.index(candidate.mask_index)]
        logits = await self._on_thread(row.cpu)
        mask = await self._write_with(logits, candidate, size, output)
        if not output.refinement_tokens:
            return mask
        token = self._refinements.save(search.tenant, embedding.header, candidate.mask_index, logits)
        return dataclasses.replace(mask, refinement_token=token)

    async def _write_with(
        self, logits: torch.Tensor | None, candidate: Candidate, size: tuple[int, int], output: OutputOptions
    ) -> Mask:
        mask = await self._on_thread(write_candidate, candidate, size, output, logits)
        ReplyBudget(self._max_reply_bytes).spend(mask)
        return mask

    async def _decode(
        self, search: Search, job: ImageJob, points: Sequence[tuple[float, float]], begun: bool = True
    ) -> list[PromptLogits]:
        """All three masks of each point, from the bulk lane."""
        prompts = tuple(Prompt(np.array([point], np.float32), np.ones(1, np.int64)) for point in points)
        served = await self._batcher.submit(
            dataclasses.replace(job, prompts=prompts),
            deadline_s=math.inf if search.deadline_s is None else search.deadline_s,
            lane=Lane.BULK,
            tenant=search.tenant,
            begun=begun,
        )
        return served.value

    async def _on_thread(self, function: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        def work() -> Result:
            with self._guard.watch():
                return function(*arguments)

        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _sift_piece(
    answers: Sequence[PromptLogits],
    job: ImageJob,
    view: View,
    piece: Sequence[tuple[float, float]],
    request: EverythingRequest,
) -> list[Candidate]:
    """Of a piece at once: a thread for each of its points would cost more than sifting what a GPU has cut."""
    return [
        candidate
        for point, answer in zip(piece, answers, strict=True)
        for candidate in sift(answer, job, view, point, request.thresholds, request.output.mask_threshold)
    ]


def _check_memory(found: Sequence[Candidate]) -> None:
    if sum(candidate.size_bytes for candidate in found) > MAX_CANDIDATE_BYTES:
        raise ReplyTooLarge(f"the masks found take more than {MAX_CANDIDATE_BYTES} bytes; raise the thresholds")


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
