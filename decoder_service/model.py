"""The prompt encoder and mask decoder of SAM over many images and prompts at once.

    jobs ─► tiles of one token count ─► tokens [S, j_prompts, T, 256] jagged ─┐
    embeddings ─► prepared once, kept by the caller ──────────────────────────┴► `Network` ─► logits

The function is that of `segment_anything`'s `PromptEncoder` and `MaskDecoder` on their own weights; what depends on the
image alone is computed once for each embedding, and projections of pixels are moved to the tokens: see `Pixels`.
"""

import itertools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nested import nested_tensor_from_jagged

from splitsam.common.precision import DTYPES, exact_convolutions
from splitsam.common.sam_modules import Sam
from splitsam.decoder_service.cutting import CutMask, Cutter, Uncut
from splitsam.decoder_service.graphs import TileRunner
from splitsam.decoder_service.network import Network, Prediction
from splitsam.decoder_service.packing import TOKENS_OF_SELECTION, ImageJob, Tile, pack
from splitsam.decoder_service.pixels import Pixels
from splitsam.decoder_service.prepared import PreparedEmbedding

Owner = tuple[int, int]  # a job, and a prompt of it


@dataclass(frozen=True, eq=False)
class PromptLogits:
    """What the model answers to one prompt, for k masks in the order of their mask tokens.

    Args:
        mask_indices: which mask token made each: 0, or 1 to 3.
        predicted_iou: the model's own estimate for each, about 0 to 1.
        logits: [k, 256, 256] float32 of the padded input, on the model's device; a view of its tile.
        cut: the masks themselves, where the job asked for them and the model is on a GPU.
    """

    mask_indices: tuple[int, ...]
    predicted_iou: tuple[float, ...]
    logits: Tensor
    cut: tuple[CutMask, ...] | None = None


class DecoderModel:
    """SAM's prompt encoder and mask decoder on one device.

    Args:
        sam: `segment_anything`'s model with its weights loaded; its modules are copied, not changed.
        device: where to compute.
        precision: of the transformer and upscaling; positional encodings and the small heads stay fp32.
        max_prompts_per_forward: prompts in one forward pass; each takes about 25 MiB in fp32, 12 in bf16.
        kernels: on a GPU, cut masks there and, in bf16, decode with this project's kernels and CUDA graphs.
    """

    def __init__(
        self,
        sam: Sam,
        device: torch.device | str,
        precision: Literal["fp32", "bf16"] = "fp32",
        max_prompts_per_forward: int = 16,
        kernels: bool = False,
    ):
        self.device = torch.device(device)
        self.dtype = DTYPES[precision]
        self.max_prompts_per_forward = max_prompts_per_forward
        self._network = Network(sam, self.device, self.dtype, kernels)
        self._cutter = Cutter(self.device) if kernels and self.device.type == "cuda" else None
        self._runner = TileRunner(self._network, max_prompts_per_forward)

    @torch.no_grad()
    def capture(self) -> None:
        """Make CUDA graphs of the usual shapes, in some seconds; without it they run launch by launch."""
        if self._network.has_kernels_for(0):
            self._runner.capture()

    @torch.no_grad()
    def prepare(self, embedding: Tensor) -> PreparedEmbedding:
        """An embedding with what every click on it needs and none changes; callers keep it.

        Args:
            embedding: [256, 64, 64] of any floating dtype, on any device.
        """
        return self._network.prepare(embedding)

    @torch.no_grad()
    def decode(self, jobs: Sequence[ImageJob]) -> list[list[PromptLogits]]:
        """Predict mask logits for every prompt of every image.

        Args:
            jobs: images of any number of callers, each with any number of prompts.

        Returns:
            For each job and each of its prompts, in order, its masks. Batch-mates change nothing but rounding.

        Raises:
            torch.OutOfMemoryError: several jobs do not fit together, or one not even prompt by prompt.
        """
        prompts = self.max_prompts_per_forward
        # Triton launches on the current device, which is each thread's own.
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            while True:
                try:
                    return self._decode(jobs, prompts)
                except torch.OutOfMemoryError:
                    if len(jobs) > 1 or prompts == 1:
                        raise
                prompts //= 2  # out here what the failed attempt held is free again

    def _decode(self, jobs: Sequence[ImageJob], max_prompts: int) -> list[list[PromptLogits]]:
        """As `decode`, at most `max_prompts` in one forward pass."""
        tiles = pack(jobs, max_prompts)
        images = {i: self._prepared(jobs[i]) for i in {i for tile in tiles for i in tile.job_of_source}}
        with exact_convolutions(self.device, self.dtype):
            sources = [self._prepare_sources(tile, images) for tile in tiles]
            outputs = [self._forward(tile, found) for tile, found in zip(tiles, sources, strict=True)]
        rows = [
            (owner, row if k == len(row) else row[:k])
            for tile, output in zip(tiles, outputs, strict=True)
            for owner, row in zip(tile.owners, output.logits.unbind(), strict=True)
            for k in (len(_tokens_of(jobs, owner)),)
        ]
        cut = self._cut(jobs, rows)
        # One copy for all tiles: the host waits for the device here, and above for what was cut, and nowhere before.
        numbers = [torch.stack([output.mask_indices.float(), output.predicted_iou], -1).flatten() for output in outputs]
        host = torch.cat(numbers).tolist() if numbers else []
        widths = [tile.wanted.shape[1] for tile in tiles for _ in tile.owners]
        answers: dict[tuple[int, int], PromptLogits] = {}
        position = 0
        for (owner, logits), width in zip(rows, widths, strict=True):
            scores = host[position : position + 2 * len(logits)]
            position += 2 * width
            indices = tuple(int(index) for index in scores[::2])
            answers[owner] = PromptLogits(indices, tuple(scores[1::2]), logits, cut.get(owner))
        return [[answers[i, j] for j in range(len(job.prompts))] for i, job in enumerate(jobs)]

    def _cut(self, jobs: Sequence[ImageJob], rows: Sequence[tuple[Owner, Tensor]]) -> dict[Owner, tuple[CutMask, ...]]:
        """The masks of each prompt whose job asks for them, on a GPU."""
        if self._cutter is None:
            return {}
        asked = [(owner, logits, cut) for owner, logits in rows if (cut := jobs[owner[0]].cut) is not None]
        uncut = [
            Uncut(one, jobs[owner[0]].input_size, jobs[owner[0]].original_size, cut)
            for owner, logits, cut in asked
            for one in logits.unbind()
        ]
        masks = iter(self._cutter.cut(uncut))
        return {owner: tuple(itertools.islice(masks, len(logits))) for owner, logits, _ in asked}

    def _forward(self, tile: Tile, sources: Sequence[PreparedEmbedding]) -> Prediction:
        network = self._network
        if network.has_kernels_for(tile.kinds.shape[1]):
            return self._runner.run(tile, sources)
        tokens = network.embed(self._to_device(tile.coords), self._to_device(tile.kinds))
        jagged = nested_tensor_from_jagged(tokens, self._to_device(tile.offsets))
        pixels = Pixels(sources, np.diff(tile.offsets).tolist(), network.positions)
        return network.predict(jagged, pixels, self._to_device(tile.wanted))

    def _prepared(self, job: ImageJob) -> PreparedEmbedding:
        return job.embedding if isinstance(job.embedding, PreparedEmbedding) else self.prepare(job.embedding)

    def _prepare_sources(self, tile: Tile, images: Mapping[int, PreparedEmbedding]) -> list[PreparedEmbedding]:
        """Each source of a tile; only those with mask inputs, the last, need work."""
        sources = [images[i] for i in tile.job_of_source]
        masked = len(tile.mask_inputs)
        if masked:
            sources[-masked:] = self._network.prepare_masked(sources[-masked:], self._to_device(tile.mask_inputs))
        return sources

    def _to_device(self, array: object) -> Tensor:
        return torch.as_tensor(array).to(self.device, non_blocking=True)


def _tokens_of(jobs: Sequence[ImageJob], owner: Owner) -> tuple[int, ...]:
    job, prompt = jobs[owner[0]], jobs[owner[0]].prompts[owner[1]]
    return TOKENS_OF_SELECTION[prompt.resolve(job.selection)]
