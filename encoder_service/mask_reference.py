"""Masks of the fp32 encoder on a grid of points, and how far those of other encoders agree with them."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from splitsam.common.precision import exact_convolutions
from splitsam.common.sam_modules import Sam
from splitsam.common.shapes import IMAGE_SIDE_PX

# Prompts of an image: one point each, this many along each side.
POINTS_PER_SIDE = 4


@dataclass(frozen=True)
class Agreement:
    """Of the n prompts of one image.

    Args:
        ious: [n] float32, of the masks of the token that fp32 rated best.
        index_flips: prompts for which another token is rated best.
    """

    ious: Tensor
    index_flips: int


@dataclass(frozen=True, eq=False)
class _Reference:
    """Of one image, on the CPU: the chosen tokens [n] int64 and their logits [n, 256, 256] float32."""

    tokens: Tensor
    logits: Tensor
    input_size: tuple[int, int]


class MaskReference:
    """Keeps the masks of fp32 and compares others with them; all are decoded in fp32 by `segment_anything`'s modules.

    Args:
        sam: with its weights; prompt encoder and mask decoder are copied.
    """

    def __init__(self, sam: Sam, device: torch.device):
        self._device = device
        self._prompt_encoder: Any = copy.deepcopy(sam.prompt_encoder).to(device)
        self._mask_decoder: Any = copy.deepcopy(sam.mask_decoder).to(device)
        self._references: list[_Reference] = []

    @torch.inference_mode()
    def keep(self, embedding: Tensor, input_size: tuple[int, int]) -> None:
        """Take the masks of one more image as the reference.

        Args:
            embedding: [256, 64, 64] float32, of the fp32 encoder.
            input_size: (width, height) in pixels of the image before padding.
        """
        scores, logits = self._decode(embedding, input_size)
        tokens = scores.argmax(1)
        self._references.append(_Reference(tokens.cpu(), _pick(logits, tokens).cpu(), input_size))

    def clear(self) -> None:
        """Forget all images."""
        self._references.clear()

    @torch.inference_mode()
    def compare(self, index: int, embedding: Tensor) -> Agreement:
        """Decode the same prompts on another embedding, [256, 64, 64], of the image that was kept as number `index`."""
        kept = self._references[index]
        scores, logits = self._decode(embedding, kept.input_size)
        tokens = kept.tokens.to(self._device)
        found = _cut(_pick(logits, tokens), kept.input_size)
        wanted = _cut(kept.logits.to(self._device), kept.input_size)
        flips = int((scores.argmax(1) != tokens).sum())
        return Agreement(measure_iou(found, wanted).cpu(), flips)

    def _decode(self, embedding: Tensor, input_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Scores [n, 3] and logits [n, 3, 256, 256] of the grid."""
        points = _grid(input_size).to(self._device)[:, None]
        labels = torch.ones(len(points), 1, dtype=torch.int, device=self._device)
        with exact_convolutions(self._device, torch.float32):
            sparse, dense = self._prompt_encoder(points=(points, labels), boxes=None, masks=None)
            logits, scores = self._mask_decoder(
                image_embeddings=embedding[None].to(self._device, torch.float32),
                image_pe=self._prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=True,
            )
        return scores, logits


def measure_iou(found: Tensor, wanted: Tensor) -> Tensor:
    """[n] float32 of [n, H, W] bool; two empty masks agree."""
    both = (found & wanted).flatten(1).sum(1).float()
    either = (found | wanted).flatten(1).sum(1).float()
    return torch.where(either > 0, both / either.clamp(min=1), torch.ones_like(both))


def _grid(input_size: tuple[int, int]) -> Tensor:
    """[n, 2] float32: points (x, y) in pixels, evenly over the image."""
    places = (torch.arange(POINTS_PER_SIDE) + 0.5) / POINTS_PER_SIDE
    return torch.cartesian_prod(places, places) * torch.tensor(input_size)


def _pick(logits: Tensor, tokens: Tensor) -> Tensor:
    """[n, 256, 256] of [n, 3, 256, 256]: the mask of each prompt's token."""
    return logits[torch.arange(len(tokens), device=logits.device), tokens]


def _cut(logits: Tensor, input_size: tuple[int, int]) -> Tensor:
    """[n, height, width] bool, as `Sam.postprocess_masks` makes them at the size of the input."""
    width, height = input_size
    frame = F.interpolate(logits[:, None], (IMAGE_SIDE_PX, IMAGE_SIDE_PX), mode="bilinear", align_corners=False)
    return frame[:, 0, :height, :width] > 0
