"""What the decoder's tests share: a seeded SAM, prompts, and segment_anything's own answer to one prompt."""

import functools
from contextlib import nullcontext

import numpy as np
import torch
import torchvision_shim  # noqa: F401

from splitsam.common.architectures import ARCHITECTURES, build_sam
from splitsam.decoder_service.packing import ImageJob
from splitsam.decoder_service.prompts import Prompt

from segment_anything.predictor import SamPredictor  # isort: skip  (splitsam makes it importable)
from segment_anything.utils.transforms import ResizeLongestSide  # isort: skip


__all__ = ["SamPredictor", "embedding", "image_job", "input_size_of", "prompt", "random_sam", "reference"]


@functools.cache
def random_sam():
    """A vit_t with seeded weights, none of them zero, biases and norms included."""
    torch.manual_seed(7)
    sam = build_sam(ARCHITECTURES["vit_t"])
    for parameter in sam.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() == 1 or not parameter.any():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return sam


def embedding(seed):
    return torch.randn(256, 64, 64, generator=torch.Generator().manual_seed(seed))


def input_size_of(original_size):
    return ResizeLongestSide.get_preprocess_shape(*original_size, 1024)


def prompt(seed, size, points=0, box=False, mask=False):
    """A seeded prompt inside an image of (height, width)."""
    rng = np.random.default_rng(seed)
    height, width = size
    corners = np.sort(rng.random((2, 2)), axis=0) * (width, height)
    return Prompt(
        points=(rng.random((points, 2)) * (width, height)).astype(np.float32),
        labels=rng.integers(0, 2, points),
        box=corners.ravel().astype(np.float32) if box else None,
        mask_input=(4 * rng.standard_normal((256, 256))).astype(np.float32) if mask else None,
    )


def image_job(values, size, prompts, selection=None):
    return ImageJob(values, size, input_size_of(size), tuple(prompts), selection)


@torch.no_grad()
def reference(job, asked, multimask, decoder_context=nullcontext):
    """segment_anything's logits [k, 256, 256] and predicted IoU [k] for one prompt."""
    sam = random_sam()
    transform = ResizeLongestSide(1024)
    points = boxes = masks = None
    if len(asked.points):
        coords = torch.as_tensor(transform.apply_coords(asked.points, job.original_size), dtype=torch.float)
        points = coords[None], torch.as_tensor(asked.labels, dtype=torch.int)[None]
    if asked.box is not None:
        boxes = torch.as_tensor(transform.apply_boxes(asked.box, job.original_size), dtype=torch.float)
    if asked.mask_input is not None:
        masks = torch.as_tensor(asked.mask_input)[None, None]
    sparse, dense = sam.prompt_encoder(points=points, boxes=boxes, masks=masks)
    with decoder_context():
        logits, iou = sam.mask_decoder(
            image_embeddings=job.embedding[None].float(),
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
        )
    return logits[0], iou[0]
