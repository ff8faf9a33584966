"""Packs the prompts of many callers into tiles that go through the model together.

SAM attends to every prompt token, a "not a point" token included, so a padded prompt gives another mask. A tile
therefore holds prompts of one exact token count, unless the model takes fillers: tokens that nothing attends to. Within
a tile the ragged dimension is prompts per source: a source is an image embedding plus its dense prompt embedding,
shared by all prompts on that image without a mask input, and a prompt with one is a source of its own.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from splitsam.decoder_service.cutting import Cut
from splitsam.decoder_service.prepared import PreparedEmbedding
from splitsam.decoder_service.prompts import FloatArray, Prompt, Selection

NOT_A_POINT, BACKGROUND, FOREGROUND, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT = range(5)
FILLER = -1
# Rows in the order of Selection's members; -1 is the best of 1 to 3.
_SELECTIONS = (Selection.SINGLE, Selection.BEST, Selection.ALL)
_WANTED = np.array([(0, 0, 0), (-1, -1, -1), (1, 2, 3)])
_COUNTS = np.array([1, 1, 3])


@dataclass(frozen=True, eq=False)
class ImageJob:
    """One image of one caller, with the prompts to decode.

    Args:
        embedding: as `DecoderModel.prepare` made it, or [256, 64, 64] fp16, bf16 or fp32 on any device, prepared anew
            in each batch; jobs that pass the same one share its work.
        original_size: (height, width) of the upright image in pixels.
        input_size: (height, width) of the resized image inside the padded 1024 x 1024 input.
        prompts: refinement tokens already resolved into `mask_input`.
        selection: which masks, or None for each prompt's default.
        cut: where a GPU is to cut the logits into masks along the way, or None not to; a CPU never does.
        on_host: where masks are cut on a GPU, bring the logits to the host.
    """

    embedding: PreparedEmbedding | torch.Tensor
    original_size: tuple[int, int]
    input_size: tuple[int, int]
    prompts: tuple[Prompt, ...]
    selection: Selection | None = None
    cut: Cut | None = None
    on_host: bool = False


@dataclass(frozen=True, eq=False)
class Tile:
    """P prompts of T tokens each over S sources, in source order; sources with mask inputs come last.

    Args:
        owners: for each prompt its (job, prompt) indices.
        job_of_source: for each source the first job that carries its embedding.
        mask_inputs: [M, 1, 256, 256] float16 or float32, of the last M sources.
        offsets: [S + 1] int64, where each source's prompts begin.
        coords: [P, T, 2] float32, pixels (x, y) of the 1024 x 1024 input.
        kinds: [P, T] int64, NOT_A_POINT to BOX_BOTTOM_RIGHT, or behind those FILLER.
        wanted: [P, K] int64 mask tokens to answer with, K = 1 or 3; -1 for the best of 1 to 3.
        counts: [P] int64, how many of those were asked for; the others repeat one.
    """

    owners: tuple[tuple[int, int], ...]
    job_of_source: tuple[int, ...]
    mask_inputs: npt.NDArray[np.floating[Any]]
    offsets: npt.NDArray[np.int64]
    coords: FloatArray
    kinds: npt.NDArray[np.int64]
    wanted: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class _Group:
    """G prompts of one tile's token count, the arrays as in `Tile`.

    Args:
        jobs, prompts: [G] indices, of a job and of a prompt of it.
        images: [G], the first job that carries the embedding.
        masked: [G], whether the prompt has a mask input.
        selections: [G] indices of Selection's members.
    """

    jobs: npt.NDArray[np.int64]
    prompts: npt.NDArray[np.int64]
    images: npt.NDArray[np.int64]
    masked: npt.NDArray[np.bool_]
    selections: npt.NDArray[np.int64]
    coords: FloatArray
    kinds: npt.NDArray[np.int64]

    def __getitem__(self, rows: slice | npt.NDArray[np.int64]) -> "_Group":
        return _Group(*(getattr(self, field.name)[rows] for field in fields(self)))


def pack(jobs: Sequence[ImageJob], max_prompts: int, widths: Sequence[int] = ()) -> Iterator[Tile]:
    """Group prompts by token count and cut each group into tiles of at most `max_prompts`.

    Laid out as arrays of one count of points at a time: a batch has hundreds of prompts, and arrays of two numbers
    are slow.

    Args:
        widths: token counts, ascending, to the next of which prompts are filled up; longer ones keep their own.
    """
    layouts: dict[tuple[int, bool], list[tuple[int, int]]] = defaultdict(list)
    for i, job in enumerate(jobs):
        for j, prompt in enumerate(job.prompts):
            layouts[len(prompt.points), prompt.box is not None].append((i, j))
    first_job: dict[int, int] = {}
    images = np.array([first_job.setdefault(id(job.embedding), i) for i, job in enumerate(jobs)], np.int64)
    by_tokens: dict[int, list[_Group]] = defaultdict(list)
    for (points, boxed), owners in layouts.items():
        group = _lay_out(jobs, images, np.array(owners, np.int64), points, boxed, widths)
        by_tokens[group.kinds.shape[1]].append(group)
    for groups in by_tokens.values():
        joined = _Group(*(np.concatenate([getattr(group, field.name) for group in groups]) for field in fields(_Group)))
        ordered = joined[np.lexsort((joined.prompts, joined.jobs, joined.images, joined.masked))]
        for start in range(0, len(ordered.jobs), max_prompts):
            yield _tile(jobs, ordered[slice(start, start + max_prompts)])


def _lay_out(
    jobs: Sequence[ImageJob],
    images: npt.NDArray[np.int64],
    owners: npt.NDArray[np.int64],
    points: int,
    boxed: bool,
    widths: Sequence[int],
) -> _Group:
    """Prompts of so many points, with or without a box, as the tokens that `PromptEncoder` makes of them.

    Those are points, then box corners or, behind points alone, a padding token; then fillers to the next of `widths`.

    Source: `ResizeLongestSide.apply_coords` and `PromptEncoder.forward` of segment_anything.
    """
    pairs = [(jobs[i], jobs[i].prompts[j]) for i, j in owners.tolist()]
    prompts = [prompt for _, prompt in pairs]
    tokens = points + 2 * boxed + (points > 0 and not boxed)
    width = next((width for width in widths if width >= tokens), tokens)
    coords, kinds = np.zeros((len(prompts), width, 2)), np.full((len(prompts), width), NOT_A_POINT, np.int64)
    kinds[:, tokens:] = FILLER
    if points:
        # One after the other and reshaped: `np.stack` takes several times as long for hundreds of small arrays.
        coords[:, :points] = np.concatenate([prompt.points for prompt in prompts]).reshape(-1, points, 2)
        labels = np.concatenate([prompt.labels for prompt in prompts]).reshape(-1, points)
        kinds[:, :points] = np.where(labels == 1, FOREGROUND, BACKGROUND)
    if boxed:
        boxes = [prompt.box for prompt in prompts if prompt.box is not None]
        coords[:, points:tokens] = np.concatenate(boxes).reshape(-1, 2, 2)
        kinds[:, points:tokens] = BOX_TOP_LEFT, BOX_BOTTOM_RIGHT
    # The sides are rounded to whole pixels one by one, so x and y scale a little differently.
    scales = [[kept / length for kept, length in zip(job.input_size, job.original_size, strict=True)] for job in jobs]
    coords *= np.array(scales)[owners[:, 0], None, ::-1]
    return _Group(
        jobs=owners[:, 0],
        prompts=owners[:, 1],
        images=images[owners[:, 0]],
        masked=np.array([prompt.mask_input is not None for prompt in prompts]),
        selections=np.array([_SELECTIONS.index(prompt.resolve(job.selection)) for job, prompt in pairs]),
        coords=coords.astype(np.float32),
        kinds=kinds,
    )


def _tile(jobs: Sequence[ImageJob], group: _Group) -> Tile:
    starts = np.ones(len(group.jobs), np.bool_)
    starts[1:] = group.masked[1:] | (group.images[1:] != group.images[:-1])
    begins = np.flatnonzero(starts)
    owners = list(zip(group.jobs.tolist(), group.prompts.tolist(), strict=True))
    prompts = [jobs[i].prompts[j] for i, j in itertools.compress(owners, group.masked.tolist())]
    masks = [prompt.mask_input for prompt in prompts if prompt.mask_input is not None]
    counts = _COUNTS[group.selections]
    return Tile(
        owners=tuple(owners),
        job_of_source=tuple(group.images[begins].tolist()),
        mask_inputs=np.stack(masks)[:, None] if masks else np.zeros((0, 1, 4, 4), np.float32),
        offsets=np.append(begins, len(owners)),
        coords=group.coords,
        kinds=group.kinds,
        wanted=_WANTED[group.selections, : counts.max()],
        counts=counts,
    )
