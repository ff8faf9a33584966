"""The prompt encoder and mask decoder of SAM over many images and prompts at once.

    jobs ─► tiles of one token count ─► tokens [S, j_prompts, T, 256] jagged ─┐
    embeddings ─► prepared once, kept by the caller ──────────────────────────┴► `Network` ─► logits

The function is that of `segment_anything`'s `PromptEncoder` and `MaskDecoder` on their own weights; what depends on the
image alone is computed once for each embedding, and projections of pixels are moved to the tokens: see `Pixels`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nested import nested_tensor_from_jagged

from splitsam.common.codecs import to_fp16
from splitsam.common.precision import DTYPES, exact_convolutions
from splitsam.common.sam_modules import Sam
from splitsam.common.transfers import Download, Steps, finish, finish_on_loop, upload
from splitsam.decoder_service.cutting import CutMask, Cutter
from splitsam.decoder_service.graphs import TileRunner
from splitsam.decoder_service.masked_graphs import MaskedGraphs
from splitsam.decoder_service.network import Network, Prediction
from splitsam.decoder_service.packing import ImageJob, Tile, pack
from splitsam.decoder_service.pixels import Pixels
from splitsam.decoder_service.prepared import PreparedEmbedding
from splitsam.decoder_service.tile_cutting import CutPlan, TileCut

Owner = tuple[int, int]  # a job, and a prompt of it


@dataclass(frozen=True, eq=False)
class PromptLogits:
    """What the model answers to one prompt, for k masks in the order of their mask tokens.

    Args:
        mask_indices: which mask token made each: 0, or 1 to 3.
        predicted_iou: the model's own estimate for each, about 0 to 1.
        logits: [k, 256, 256] of the padded input, a view of its tile: float32 on the model's device, or float16 on the
            host where the job asked for that.
        cut: the masks themselves, where the job asked for them and the model is on a GPU; None in place of those
            that it did not want.
    """

    mask_indices: tuple[int, ...]
    predicted_iou: tuple[float, ...]
    logits: Tensor
    cut: tuple[CutMask | None, ...] | None = None


@dataclass(eq=False)
class _Begun:
    """A tile that the device works on.

    Args:
        sources: that the device reads, kept until it has.
        scores: [P, K, 2] on their way to the host, mask token and predicted IoU of each mask.
        logits: likewise, where a job wants them there.
        cut: what is being cut of it.
    """

    tile: Tile
    sources: Sequence[PreparedEmbedding]
    prediction: Prediction
    scores: Download
    logits: Download | None = None
    cut: TileCut | None = None


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
        self._masked: MaskedGraphs | None = None

    @torch.no_grad()
    def capture(self) -> None:
        """Make CUDA graphs of the usual shapes, in some seconds; without it they run launch by launch."""
        if self._network.widths:
            self._runner.capture()
            with torch.cuda.device(self.device):
                self._masked = MaskedGraphs(self._network)
                self._masked.capture()
        if self._cutter is not None:
            with torch.cuda.device(self.device):
                self._cutter.capture()

    @torch.no_grad()
    def prepare(self, embedding: Tensor) -> PreparedEmbedding:
        """An embedding with what every click on it needs and none changes; callers keep it.

        Args:
            embedding: [256, 64, 64] of any floating dtype, on any device.
        """
        return self._network.prepare(embedding)

    def decode(self, jobs: Sequence[ImageJob]) -> list[list[PromptLogits]]:
        """Predict mask logits for every prompt of every image.

        Args:
            jobs: images of any number of callers, each with any number of prompts.

        Returns:
            For each job and each of its prompts, in order, its masks. Batch-mates change nothing but rounding.

        Raises:
            torch.OutOfMemoryError: several jobs do not fit together, or one not even prompt by prompt.
        """
        return finish(self._answer(jobs), self.device)

    async def decode_on_loop(self, jobs: Sequence[ImageJob]) -> list[list[PromptLogits]]:
        """As `decode`, on the thread of an event loop, which does other things while the device works.

        For a GPU: a thread that launches lets go of the interpreter with every operation and waits for it again.
        """
        return await finish_on_loop(self._answer(jobs), self.device)

    @torch.no_grad()
    def _answer(self, jobs: Sequence[ImageJob]) -> Steps[list[list[PromptLogits]]]:
        prompts = self.max_prompts_per_forward
        while True:
            try:
                return (yield from self._decode(jobs, prompts))
            except torch.OutOfMemoryError:
                if len(jobs) > 1 or prompts == 1:
                    raise
            prompts //= 2  # out here what the failed attempt held is free again

    def _decode(self, jobs: Sequence[ImageJob], max_prompts: int) -> Steps[list[list[PromptLogits]]]:
        """As `decode`, at most `max_prompts` in one forward pass."""
        images: dict[int, PreparedEmbedding] = {}
        begun: list[_Begun] = []
        plan = CutPlan.of(jobs, self._cutter)
        with exact_convolutions(self.device, self.dtype):
            # The device computes on one tile while the next is packed.
            for tile in pack(jobs, max_prompts, self._network.widths):
                images |= {i: self._prepared(jobs[i]) for i in tile.job_of_source if i not in images}
                one = self._begin(tile, self._prepare_sources(tile, images))
                if self._cutter is not None and any(jobs[i].on_host for i, _ in tile.owners):
                    one.logits = Download(to_fp16(one.prediction.logits))
                if plan is not None and plan.floors is None:
                    one.cut = plan.begin(tile, one.prediction.logits, None)
                begun.append(one)
        # The host waits for the device where it reads scores, and for what was cut, and nowhere else.
        if plan is not None and plan.floors is not None:
            for one in begun:
                yield one.scores
                one.cut = plan.begin(one.tile, one.prediction.logits, one.scores.wait()[0])
        answers: dict[Owner, PromptLogits] = {}
        for one in begun:
            tile = one.tile
            masks = (yield from one.cut.masks()) if one.cut is not None else [None] * len(tile.owners)
            yield one.scores
            [of_tile] = one.scores.wait()
            if one.logits is not None:
                yield one.logits
            rows = (one.prediction.logits if one.logits is None else torch.from_numpy(one.logits.wait()[0])).unbind()
            indices, ious = of_tile[..., 0].astype(np.int64).tolist(), of_tile[..., 1].tolist()
            found = zip(tile.owners, tile.counts.tolist(), indices, ious, rows, masks, strict=True)
            for owner, count, index, iou, row, own in found:
                kept = row if count == tile.wanted.shape[1] else row[:count]
                answers[owner] = PromptLogits(tuple(index[:count]), tuple(iou[:count]), kept, own)
        return [[answers[i, j] for j in range(len(job.prompts))] for i, job in enumerate(jobs)]

    def _begin(self, tile: Tile, sources: Sequence[PreparedEmbedding]) -> "_Begun":
        prediction = self._forward(tile, sources)
        return _Begun(tile, sources, prediction, Download(prediction.scores))

    def _forward(self, tile: Tile, sources: Sequence[PreparedEmbedding]) -> Prediction:
        network = self._network
        if tile.kinds.shape[1] in network.widths:
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
            images_of_masks = sources[-masked:]
            if self._masked is not None and self._masked.take(tile.mask_inputs):
                sources[-masked:] = self._masked.prepare(images_of_masks, tile.mask_inputs)
            else:
                mask_inputs = upload(tile.mask_inputs, self.device)
                sources[-masked:] = self._network.prepare_masked(images_of_masks, mask_inputs)
        return sources

    def _to_device(self, array: object) -> Tensor:
        return torch.as_tensor(array).to(self.device, non_blocking=True)
