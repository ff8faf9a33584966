"""Importing this lets `segment_anything.predictor` and `.utils.transforms` be imported where there is no torchvision.

They use two functions of it, on PIL images. These follow torchvision's own PIL code path, which calls Pillow in turn:
https://github.com/pytorch/vision/blob/main/torchvision/transforms/_functional_pil.py. A torchvision that is installed
is left alone. Tests only.
"""

import importlib.util
import sys
from types import ModuleType

import numpy as np
from PIL import Image


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Bilinear, to (height, width)."""
    return image.resize((size[1], size[0]), Image.Resampling.BILINEAR)


def to_pil_image(pixels: np.ndarray) -> Image.Image:
    """From [h, w, 3] uint8 RGB."""
    return Image.fromarray(pixels)


if importlib.util.find_spec("torchvision") is None:
    _functional = ModuleType("torchvision.transforms.functional")
    vars(_functional).update(resize=resize, to_pil_image=to_pil_image)
    _transforms = ModuleType("torchvision.transforms")
    vars(_transforms).update(functional=_functional)
    _torchvision = ModuleType("torchvision")
    vars(_torchvision).update(transforms=_transforms, __path__=[])
    for _module in (_torchvision, _transforms, _functional):
        sys.modules[_module.__name__] = _module
