"""The reference modules of `segment_anything`, without running that package's `__init__`.

`segment_anything/__init__.py` imports its predictor, which needs torchvision; the services need only the
modules, and no torchvision installs next to every torch they run on. An empty package object with the right
`__path__` lets the submodules be imported directly. It can go when upstream imports its predictor lazily.
"""

import importlib.util
import sys
from types import ModuleType

if "segment_anything" not in sys.modules:
    _spec = importlib.util.find_spec("segment_anything")
    if _spec is None or _spec.submodule_search_locations is None:
        raise ImportError("the package segment-anything is not installed")
    _package = ModuleType("segment_anything")
    _package.__path__ = list(_spec.submodule_search_locations)
    _package.__spec__ = _spec
    sys.modules["segment_anything"] = _package

from segment_anything.build_sam import _build_sam as assemble_sam
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

__all__ = ["ImageEncoderViT", "MaskDecoder", "PromptEncoder", "Sam", "TwoWayTransformer", "assemble_sam"]
