"""Packs the prompts of many callers into tiles that go through the model together.

SAM attends to every prompt token, a "not a point" token included, so a padded prompt gives another mask. A tile
therefore holds prompts of one exact token count, and nothing is ever padded to fit a neighbour. Within a tile the
ragged dimension is prompts per source: a source is an image embedding plus its dense prompt embedding, shared by all
prompts on that image without a mask input, and a prompt with one is a source of its own.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from splitsam.decoder_service.cutting import Cut
from splitsam.decoder_service.prepared import PreparedEmbedding
from splitsam.decoder_service.prompts import FloatArray, Prompt, Selection

NOT_A_POINT, BACKGROUND, FOREGROUND, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT = range(5)
TOKENS_OF_SELECTION = {Selection.SINGLE: (0,), Selection.BEST: (-1,), Selection.ALL: (1, 2, 3)}


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
    """

    embedding: PreparedEmbedding | torch.Tensor
    original_size: tuple[int, int]
    input_size: tuple[int, int]
    prompts: tuple[Prompt, ...]
    selection: Selection | None = None
    cut: Cut | None = None


@dataclass(frozen=True, eq=False)
class Tile:
    """P prompts of T tokens each over S sources, in source order; sources with mask inputs come last.

    Args:
        owners: for each prompt its (job, prompt) indices.
        job_of_source: for each source the first job that carries its embedding.
        mask_inputs: [M, 1, 256, 256] float32, of the last M sources.
        offsets: [S + 1] int64, where each source's prompts begin.
        coords: [P, T, 2] float32, pixels (x, y) of the 1024 x 1024 input.
        kinds: [P, T] int64, NOT_A_POINT to BOX_BOTTOM_RIGHT.
        wanted: [P, K] int64 mask tokens to answer with, K = 1 or 3; -1 for the best of 1 to 3.
    """

    owners: tuple[tuple[int, int], ...]
    job_of_source: tuple[int, ...]
    mask_inputs: FloatArray
    offsets: npt.NDArray[np.int64]
    coords: FloatArray
    kinds: npt.NDArray[np.int64]
    wanted: npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class _Entry:
    owner: tuple[int, int]
    image: int
    prompt: Prompt
    coords: list[tuple[float, float]]
    kinds: list[int]
    selection: Selection


def pack(jobs: Sequence[ImageJob], max_prompts: int) -> list[Tile]:
    """Group prompts by exact token count and cut each group into tiles of at most `max_prompts`."""
    groups: dict[int, list[_Entry]] = defaultdict(list)
    first_job: dict[int, int] = {}
    for i, job in enumerate(jobs):
        image = first_job.setdefault(id(job.embedding), i)
        for j, prompt in enumerate(job.prompts):
            coords, kinds = prompt_tokens(prompt, job.original_size, job.input_size)
            groups[len(kinds)].append(_Entry((i, j), image, prompt, coords, kinds, prompt.resolve(job.selection)))
    tiles = []
    for entries in groups.values():
        entries.sort(key=lambda entry: (entry.prompt.mask_input is not None, entry.image))
        tiles += [_tile(entries[start : start + max_prompts]) for start in range(0, len(entries), max_prompts)]
    return tiles


def prompt_tokens(
    prompt: Prompt, original_size: tuple[int, int], input_size: tuple[int, int]
) -> tuple[list[tuple[float, float]], list[int]]:
    """Lay a prompt out as the tokens that `PromptEncoder` makes of it: points, then box corners or a padding token.

    Lists, because a batch has hundreds of prompts, and arrays of two numbers are slow.

    Returns:
        T pixels (x, y) of the 1024 x 1024 input, and T kinds.

    Source: `ResizeLongestSide.apply_coords` and `PromptEncoder.forward` of segment_anything.
    """
    points = prompt.points.tolist()
    kinds = [FOREGROUND if label == 1 else BACKGROUND for label in prompt.labels.tolist()]
    if prompt.box is not None:
        x0, y0, x1, y1 = prompt.box.tolist()
        points += [(x0, y0), (x1, y1)]
        kinds += [BOX_TOP_LEFT, BOX_BOTTOM_RIGHT]
    elif points:
        points.append((0.0, 0.0))
        kinds.append(NOT_A_POINT)
    # The sides are rounded to whole pixels one by one, so x and y scale a little differently.
    x_scale, y_scale = input_size[1] / original_size[1], input_size[0] / original_size[0]
    return [(x * x_scale, y * y_scale) for x, y in points], kinds


def _tile(entries: list[_Entry]) -> Tile:
    sources: list[tuple[int, Prompt | None]] = []
    counts: list[int] = []
    for entry in entries:
        source = (entry.image, entry.prompt if entry.prompt.mask_input is not None else None)
        if not sources or sources[-1] != source:
            sources.append(source)
            counts.append(0)
        counts[-1] += 1
    masks = [prompt.mask_input for _, prompt in sources if prompt is not None and prompt.mask_input is not None]
    tokens = [TOKENS_OF_SELECTION[entry.selection] for entry in entries]
    width = max(map(len, tokens))
    return Tile(
        owners=tuple(entry.owner for entry in entries),
        job_of_source=tuple(image for image, _ in sources),
        mask_inputs=np.stack(masks)[:, None] if masks else np.zeros((0, 1, 4, 4), np.float32),
        offsets=np.cumsum([0, *counts], dtype=np.int64),
        coords=np.array([entry.coords for entry in entries], np.float32).reshape(len(entries), -1, 2),
        kinds=np.array([entry.kinds for entry in entries], np.int64),
        wanted=np.array([(token * width)[:width] for token in tokens], np.int64),
    )
