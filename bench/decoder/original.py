"""Unmodified `segment-anything`: its predictor and its mask generator on embeddings that are there already.

Both need a few functions of torchvision, which does not install next to every torch. Where it is missing, Pillow and
the decoder service's own non-maximum suppression take their place.
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor

from bench.decoder.scenes import HEIGHT, WIDTH, Rle, Scene
from splitsam.common.sam_modules import Sam
from splitsam.decoder_service.candidates import suppress

GENERATOR_BATCH = 64  # its own default
Annotation = dict[str, Any]


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize((size[1], size[0]), Image.Resampling.BILINEAR)


def _box_area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _batched_nms(boxes: Tensor, scores: Tensor, _categories: Tensor, iou_threshold: float) -> Tensor:
    """For boxes of one category."""
    return torch.tensor(suppress(boxes.cpu(), scores.cpu(), iou_threshold), dtype=torch.int64, device=boxes.device)


def _install_torchvision() -> None:
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return
    contents: dict[str, dict[str, Any]] = {
        "torchvision": {"__path__": []},
        "torchvision.transforms": {"__path__": []},
        "torchvision.transforms.functional": {"resize": _resize, "to_pil_image": Image.fromarray},
        "torchvision.ops": {"__path__": []},
        "torchvision.ops.boxes": {"batched_nms": _batched_nms, "box_area": _box_area},
    }
    for name, members in contents.items():
        module = ModuleType(name)
        vars(module).update(members, __spec__=ModuleSpec(name, None, is_package="__path__" in members))
        sys.modules[name] = module


_install_torchvision()
from segment_anything.automatic_mask_generator import SamAutomaticMaskGenerator  # noqa: E402
from segment_anything.predictor import SamPredictor  # noqa: E402


class Original:
    """The package as it is published, in fp32."""

    def __init__(self, sam: Sam, device: torch.device) -> None:
        self.sam = sam.to(device)
        self._predictor = SamPredictor(self.sam)
        self._features: Tensor | None = None

    def encode(self, image: np.ndarray) -> Tensor:
        """[height, width, 3] uint8 to [256, 64, 64] float16, the form in which the cache keeps it."""
        self._predictor.set_image(image)
        return self._predictor.get_image_embedding()[0].half()

    def click(self, scene: Scene, point: np.ndarray) -> Rle:
        """One point, its best mask, through `SamPredictor.predict`."""
        self._look_at(scene)
        masks, scores, _ = self._predictor.predict(point[None], np.ones(1, np.int64), multimask_output=True)
        return encode(masks[int(scores.argmax())])

    def decode(self, scenes: list[Scene]) -> list[tuple[Tensor, Tensor]]:
        """For each image its prompts' logits [n, 3, 256, 256] and predicted IoU [n, 3], image by image."""
        return [self._decode(scene) for scene in scenes]

    def segment(self, scenes: list[Scene]) -> list[Rle]:
        """The best mask of each prompt, image by image through `SamPredictor.predict_torch`."""
        rles = []
        for scene in scenes:
            masks, scores = self.predict(scene)
            best = masks[torch.arange(len(masks), device=masks.device), scores.argmax(1)].cpu().numpy()
            rles += [encode(mask) for mask in best]
        return rles

    def predict(self, scene: Scene) -> tuple[Tensor, Tensor]:
        """Masks [n, 3, height, width] bool and predicted IoU [n, 3] of an image's prompts."""
        self._look_at(scene)
        masks, scores, _ = self._predictor.predict_torch(*self._points(scene), multimask_output=True)
        return masks, scores

    def generate(self, scene: Scene, side: int, predicted_iou: float, stability: float) -> list[Annotation]:
        """Everything in an image, as COCO's RLE."""
        generator = SamAutomaticMaskGenerator(
            self.sam,
            points_per_side=side,
            points_per_batch=GENERATOR_BATCH,
            pred_iou_thresh=predicted_iou,
            stability_score_thresh=stability,
            output_mode="coco_rle",
        )
        generator.predictor = _Encoded(self.sam)
        generator.predictor.scene = scene
        return list(generator.generate(scene.image))

    def _look_at(self, scene: Scene) -> None:
        _give_features(self._predictor, scene)

    def _points(self, scene: Scene) -> tuple[Tensor, Tensor]:
        coords = torch.from_numpy(self._predictor.transform.apply_coords(scene.clicks, (HEIGHT, WIDTH)))
        device = self._predictor.device
        labels = torch.ones(len(coords), 1, dtype=torch.int, device=device)
        return coords[:, None].to(device, torch.float32), labels

    def _decode(self, scene: Scene) -> tuple[Tensor, Tensor]:
        coords, labels = self._points(scene)
        sparse, dense = self.sam.prompt_encoder(points=(coords, labels), boxes=None, masks=None)
        answer: tuple[Tensor, Tensor] = self.sam.mask_decoder(
            image_embeddings=scene.embedding[None].float(),
            image_pe=self.sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
        return answer


class _Encoded(SamPredictor):
    """Has the image's embedding instead of making it."""

    scene: Scene

    def set_image(self, _image: np.ndarray, _format: str = "RGB") -> None:
        _give_features(self, self.scene)


def _give_features(predictor: SamPredictor, scene: Scene) -> None:
    predictor.features = scene.embedding[None].float()
    predictor.original_size, predictor.input_size = (HEIGHT, WIDTH), scene.input_size
    predictor.is_image_set = True


def encode(mask: np.ndarray) -> Rle:
    """COCO's RLE of a [height, width] mask, as users of the package make it."""
    rle: Rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return rle
