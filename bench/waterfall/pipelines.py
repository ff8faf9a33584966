"""What is timed: an image encoder on a prefix of the rungs, and the prompts decoded behind it.

`segment-anything` itself is the empty prefix: its encoder untouched in fp32, its decoder image by image. Its decoder
stays in the loop until the rung `nested`, in the precision of the encoder, with prompts encoded in fp32. CUDA graphs
come with the rung `compile`.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from bench.waterfall.subjects import Clicks
from splitsam.common.precision import DTYPES
from splitsam.common.sam_modules import Sam
from splitsam.common.shapes import IMAGE_SIDE_PX
from splitsam.decoder_service.model import DecoderModel
from splitsam.decoder_service.packing import ImageJob
from splitsam.decoder_service.prompts import Prompt, Selection
from splitsam.encoder_service.graphs import GraphedEncoder
from splitsam.encoder_service.optimize import BESIDE, RUNGS, build_rungs

NESTED = "nested"
PROMPTS_PER_CALL = 64  # segment_anything's own, in its mask generator
_AFTER_NESTED = RUNGS.index("triton") + 1
LADDERS = {
    "encoder": (*RUNGS, *BESIDE),
    "end_to_end": (*RUNGS[:_AFTER_NESTED], NESTED, *RUNGS[_AFTER_NESTED:], *BESIDE),
}
FRAME = (IMAGE_SIDE_PX, IMAGE_SIDE_PX)


@dataclass(frozen=True)
class Masks:
    """Of the n prompts of one image: predicted IoU [n, 3] float32 on the CPU, logits [n, 3, 256, 256] on the device."""

    predicted_iou: torch.Tensor
    logits: torch.Tensor


class Decoder(Protocol):
    def decode(self, embeddings: torch.Tensor, clicks: Clicks) -> Any:
        """What is timed: three masks for each click (x, y) of the 1024 px frame."""

    def read(self, answers: Any) -> list[Masks]:
        """For each image what `decode` has answered, in one form for every decoder; not timed."""


class LoopDecoder:
    """`segment_anything`'s modules, one image after another, at most 64 of its prompts in a call."""

    def __init__(self, sam: Sam, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._prompt_encoder = copy.deepcopy(sam.prompt_encoder).to(device)
        self._mask_decoder = copy.deepcopy(sam.mask_decoder).to(device, dtype)

    def decode(self, embeddings: torch.Tensor, clicks: Clicks) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
        return [
            [self._decode_chunk(embedding[None], chunk) for chunk in torch.split(points, PROMPTS_PER_CALL)]
            for embedding, points in zip(embeddings, clicks, strict=True)
        ]

    def _decode_chunk(self, embedding: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        coords = points.to(self._device)[:, None]
        labels = torch.ones(len(points), 1, dtype=torch.int, device=self._device)
        sparse, dense = self._prompt_encoder(points=(coords, labels), boxes=None, masks=None)
        answer: tuple[torch.Tensor, torch.Tensor] = self._mask_decoder(
            image_embeddings=embedding.to(self._dtype),
            image_pe=self._prompt_encoder.get_dense_pe().to(self._dtype),
            sparse_prompt_embeddings=sparse.to(self._dtype),
            dense_prompt_embeddings=dense.to(self._dtype),
            multimask_output=True,
        )
        return answer

    def read(self, answers: Any) -> list[Masks]:
        return [
            Masks(torch.cat([iou for _, iou in chunks]).float().cpu(), torch.cat([logits for logits, _ in chunks]))
            for chunks in answers
        ]


class NestedDecoder:
    """The decoder service's model: the ragged prompts of all images packed into jagged tiles."""

    def __init__(self, sam: Sam, device: torch.device, dtype: torch.dtype) -> None:
        self._model = DecoderModel(sam, device, "fp32" if dtype == torch.float32 else "bf16")

    def decode(self, embeddings: torch.Tensor, clicks: Clicks) -> Any:
        label = np.ones(1, np.int64)
        return self._model.decode(
            [
                ImageJob(
                    embedding=embedding,
                    original_size=FRAME,
                    input_size=FRAME,
                    prompts=tuple(Prompt(point[None], label) for point in points.numpy()),
                    selection=Selection.ALL,
                )
                for embedding, points in zip(embeddings, clicks, strict=True)
            ]
        )

    def read(self, answers: Any) -> list[Masks]:
        return [
            Masks(
                torch.tensor([prompt.predicted_iou for prompt in prompts]),
                torch.stack([prompt.logits for prompt in prompts]),
            )
            for prompts in answers
        ]


@dataclass(frozen=True)
class Pipeline:
    """An encoder and the decoder behind it, on one device.

    Args:
        encoder: [B, 3, 1024, 1024] float32 to [B, 256, 64, 64] in its own precision, good until the next call.
        build_decoder: called when a prompt is first decoded, so that a decoder nobody times takes no memory.
    """

    encoder: nn.Module
    build_decoder: Callable[[], Decoder]

    @functools.cached_property
    def decoder(self) -> Decoder:
        return self.build_decoder()

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        embeddings: torch.Tensor = self.encoder(images)
        return embeddings

    def segment(self, images: torch.Tensor, clicks: Clicks) -> Any:
        return self.decoder.decode(self.encode(images), clicks)


def rungs_up_to(scope: str, rung: str) -> tuple[str, ...]:
    """What a rung is built of: all before it, or before the one whose place it takes, and itself."""
    ladder = LADDERS[scope]
    return (*ladder[: ladder.index(BESIDE.get(rung, rung))], rung)


def build_pipeline(
    scope: str, sam: Sam, source: nn.Module, rungs: Sequence[str], batch: int, device: torch.device
) -> Pipeline:
    """The pipeline of some rungs, none of which is `segment-anything` itself.

    In the scope `encoder` all pipelines decode by the same fp32 decoder, so that masks differ by embeddings alone.

    Args:
        source: the fp32 image encoder to build on.
    """
    encoder = build_encoder(source, [rung for rung in rungs if rung != NESTED], batch, device)
    if scope == "encoder":
        return Pipeline(encoder, functools.partial(NestedDecoder, sam, device, torch.float32))
    dtype = DTYPES["bf16" if "bf16" in rungs else "fp32"]
    decoder = NestedDecoder if NESTED in rungs else LoopDecoder
    return Pipeline(encoder, functools.partial(decoder, sam, device, dtype))


def build_encoder(image_encoder: nn.Module, rungs: Sequence[str], batch: int, device: torch.device) -> nn.Module:
    encoder = copy.deepcopy(image_encoder)
    if not rungs:
        return encoder.to(device)
    encoder = build_rungs(encoder, rungs, device)
    if "compile" not in rungs:
        return encoder
    graphed = GraphedEncoder(encoder, (batch,), device)
    graphed.capture()
    return graphed
