"""Do a rung's masks agree with those of fp32? Same image, same prompt, and the mask token that fp32 rated best."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from bench.waterfall.pipelines import Masks, Pipeline
from bench.waterfall.subjects import HeldOut, prepare_image
from splitsam.common.sam_modules import Sam
from splitsam.common.shapes import IMAGE_SIDE_PX
from splitsam.encoder_service.mask_reference import measure_iou


@dataclass(frozen=True)
class Agreement:
    """Mean and worst IoU of two pipelines' masks, and the prompts for which they rate another mask token best."""

    miou: float
    worst_iou: float
    index_flips: int
    prompts: int


class MaskComparison:
    """Holds the masks of the fp32 pipeline on the held-out scenes and measures others against them."""

    def __init__(self, held: HeldOut, sam: Sam, reference: Pipeline, device: torch.device) -> None:
        self._clicks = held.clicks
        self._sizes = [image.shape[:2] for image in held.images]
        self._images = [prepare_image(sam, image) for image in held.images]
        self._device = device
        answers = self._answer(reference, 1)
        self._chosen = [masks.predicted_iou.argmax(1) for masks in answers]
        self._masks = [self._cut(masks, i).cpu() for i, masks in enumerate(answers)]

    def compare(self, pipeline: Pipeline, batch: int) -> Agreement:
        answers = self._answer(pipeline, batch)
        flips = sum(int((masks.predicted_iou.argmax(1) != self._chosen[i]).sum()) for i, masks in enumerate(answers))
        ious = torch.cat(
            [measure_iou(self._cut(masks, i), self._masks[i].to(self._device)) for i, masks in enumerate(answers)]
        )
        return Agreement(float(ious.mean()), float(ious.min()), flips, len(ious))

    def _answer(self, pipeline: Pipeline, batch: int) -> list[Masks]:
        """Whole batches, as the pipeline was built for; the last is filled up with empty images without prompts."""
        answers: list[Masks] = []
        for start in range(0, len(self._images), batch):
            chunk = self._images[start : start + batch]
            images = torch.zeros(batch, *chunk[0].shape)
            images[: len(chunk)] = torch.stack(chunk)
            embeddings = pipeline.encode(images.to(self._device))[: len(chunk)]
            clicks = self._clicks[start : start + batch]
            answers += pipeline.decoder.read(pipeline.decoder.decode(embeddings, clicks))
        return answers

    def _cut(self, masks: Masks, image: int) -> torch.Tensor:
        """[n, H, W] bool of the chosen tokens, at the image's size, as `Sam.postprocess_masks`."""
        height, width = self._sizes[image]
        chosen = self._chosen[image].to(self._device)
        logits = masks.logits[torch.arange(len(chosen), device=self._device), chosen][:, None].float()
        frame = F.interpolate(logits, (IMAGE_SIDE_PX, IMAGE_SIDE_PX), mode="bilinear", align_corners=False)
        return frame[:, 0, :height, :width] > 0
