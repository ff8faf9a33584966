"""Masks of the shipped vit_t on its demonstration photograph, clicked in a grid: what an embedding makes of them."""

import functools
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch

from splitsam.common.checkpoints import load_model
from splitsam.common.sam_modules import Sam
from splitsam.encoder_service.preprocess import ImageLimits, prepare_image

COLUMNS, ROWS = 10, 7  # enough that one unsure mask does not decide the mean


@dataclass(frozen=True)
class ClickedPhotograph:
    """A photograph as the encoder takes it, [1, 3, 1024, 1024], and its clicks [n, 1, 2], (x, y)."""

    sam: Sam
    pixels: torch.Tensor
    clicks: torch.Tensor
    input_size: tuple[int, int]

    @functools.cached_property
    def fp32(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and predicted IoU of segment_anything's own encoder."""
        return _decode(self, self.sam.image_encoder(self.pixels))


def load_photograph() -> ClickedPhotograph:
    sam = load_model(model=None, checkpoint=None, sha256=None, cache_dir=Path()).sam
    data = resources.files("splitsam.client.assets").joinpath("demo.jpg").read_bytes()
    image = prepare_image(data, ImageLimits())
    width, height = image.input_size
    xs, ys = (torch.arange(count) + 0.5 for count in (COLUMNS, ROWS))
    clicks = torch.cartesian_prod(xs * width / COLUMNS, ys * height / ROWS)[:, None]
    pixels = sam.preprocess(torch.from_numpy(image.pixels).permute(2, 0, 1).float())[None]
    return ClickedPhotograph(sam, pixels, clicks, image.input_size)


@torch.inference_mode()
def mean_iou(photograph: ClickedPhotograph, embedding: torch.Tensor) -> float:
    """Of the mask that fp32 likes best for each click with the same mask of this embedding, [1, 256, 64, 64]."""
    logits, _ = _decode(photograph, embedding)
    reference, scores = photograph.fp32
    clicks, best = torch.arange(len(scores)), scores.argmax(1)
    width, height = (side // 4 for side in photograph.input_size)
    one, other = (masks[clicks, best, :height, :width] > 0 for masks in (logits, reference))
    assert other.flatten(1).any(1).all()
    return float(((one & other).sum((1, 2)) / (one | other).sum((1, 2))).mean())


def _decode(photograph: ClickedPhotograph, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    sam, count = photograph.sam, len(photograph.clicks)
    labels = torch.ones(count, 1, dtype=torch.int)
    sparse, dense = sam.prompt_encoder(points=(photograph.clicks, labels), boxes=None, masks=None)
    logits, scores = sam.mask_decoder(
        image_embeddings=embedding.cpu().float(),
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=True,
    )
    return logits, scores
