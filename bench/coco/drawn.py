"""Writes a small dataset in COCO's format, drawn by the project's own generator from families never trained on.

    python -m bench.coco.drawn --output out/drawn --scenes 32

The scenes are the drawn set of `python -m training.evaluate`: procedural, no download, the same for the same number of
scenes and objects. Writes OUTPUT/images/*.png and OUTPUT/instances.json, replacing what is there.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from splitsam.decoder_service.masks import encode_rle
from training.evaluate import Example, draw_held

CATEGORY = {"id": 1, "name": "object", "supercategory": "drawn"}


def describe_object(mask: np.ndarray, annotation_id: int, image_id: int) -> dict[str, Any]:
    """An annotation of a [height, width] bool mask."""
    bitmap = mask.astype(np.uint8)
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": CATEGORY["id"],
        "segmentation": {"size": list(mask.shape), "counts": encode_rle(bitmap)},
        "area": int(mask.sum()),
        "bbox": list(cv2.boundingRect(bitmap)),
        "iscrowd": 0,
    }


def write_dataset(folder: Path, examples: Iterable[Example]) -> Path:
    """Write images and annotations; the JSON file, returned, comes last."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, example in enumerate(examples, start=1):
        file_name = f"{example.name}.png"
        Image.fromarray(example.image).save(folder / "images" / file_name)
        height, width = example.image.shape[:2]
        images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        for mask in example.masks:
            annotations.append(describe_object(mask, len(annotations) + 1, image_id))
    content = {
        "info": {"description": "scenes drawn by splitsam's generator from held-out families"},
        "images": images,
        "annotations": annotations,
        "categories": [CATEGORY],
    }
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return path


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder, made where it is missing")
    parser.add_argument(
        "--scenes", type=int, default=32, help="images; one in which nothing can be asked for is skipped"
    )
    parser.add_argument("--objects", type=int, default=6, help="objects in a scene, at most")
    arguments = parser.parse_args(words)
    if arguments.scenes < 1 or arguments.objects < 1:
        parser.error("--scenes and --objects must be at least 1")
    scenes = draw_held(arguments.scenes, arguments.objects, None, torch.device("cpu"))
    bar = tqdm(scenes, total=arguments.scenes, unit="scene", disable=None, file=sys.stderr, dynamic_ncols=True)
    try:
        print(write_dataset(arguments.output, bar))
    except OSError as error:
        sys.exit(f"error: {error.filename or arguments.output}: {error.strerror or error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
