"""Importing this lets segment_anything's predictor and mask generator be imported where there is no torchvision.

They use two functions of it on PIL images and two on boxes. The former follow torchvision's own PIL code path, which
calls Pillow in turn (https://github.com/pytorch/vision/blob/main/torchvision/transforms/_functional_pil.py), the latter
its CPU kernel (https://github.com/pytorch/vision/blob/main/torchvision/csrc/ops/cpu/nms_kernel.cpp), box by box. A
torchvision that is installed is left alone. Tests only.
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import torch
from PIL import Image


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Bilinear, to (height, width)."""
    return image.resize((size[1], size[0]), Image.Resampling.BILINEAR)


def to_pil_image(pixels: np.ndarray) -> Image.Image:
    """From [h, w, 3] uint8 RGB."""
    return Image.fromarray(pixels)


def box_area(boxes: torch.Tensor) -> torch.Tensor:
    """[N] of [N, 4] x0, y0, x1, y1."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def batched_nms(boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Indices of the boxes that no better box of their category overlaps by more, by descending score."""
    corners, categories, zero = boxes.numpy().astype(np.float32), idxs.tolist(), np.float32(0)
    kept: list[int] = []
    for i in scores.sort(stable=True, descending=True).indices.tolist():
        x0, y0, x1, y1 = corners[i]
        for j in kept:
            u0, v0, u1, v1 = corners[j]
            shared = max(zero, min(x1, u1) - max(x0, u0)) * max(zero, min(y1, v1) - max(y0, v0))
            union = (x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - shared
            if categories[i] == categories[j] and union and float(shared / union) > iou_threshold:
                break
        else:
            kept.append(i)
    return torch.tensor(kept, dtype=torch.int64)


if importlib.util.find_spec("torchvision") is None:
    _functional = ModuleType("torchvision.transforms.functional")
    vars(_functional).update(resize=resize, to_pil_image=to_pil_image)
    _transforms = ModuleType("torchvision.transforms")
    vars(_transforms).update(functional=_functional)
    _boxes = ModuleType("torchvision.ops.boxes")
    vars(_boxes).update(batched_nms=batched_nms, box_area=box_area)
    _ops = ModuleType("torchvision.ops")
    vars(_ops).update(boxes=_boxes, __path__=[])
    _torchvision = ModuleType("torchvision")
    vars(_torchvision).update(transforms=_transforms, ops=_ops, __path__=[])
    for _module in (_torchvision, _transforms, _functional, _ops, _boxes):
        _module.__spec__ = ModuleSpec(_module.__name__, None, is_package=hasattr(_module, "__path__"))
        sys.modules[_module.__name__] = _module
