"""Draw what the model finds on the evaluation's photographs beside what was outlined by hand.

    python -m training.pictures --output training/results/photographs.jpg

For each photograph four panels: the photograph, the masks drawn by hand, the model's from one click (a dot) and from a
box. One colour is one object; of the three masks the one that the model rates best is shown.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from training.evaluate import SHIPPED_CHECKPOINT, Example, Session, find_centre, load_model, read_photographs
from training.prompts import Prompts

PANEL_PX = 300
COLOURS = np.array([[230, 60, 60], [60, 160, 250], [250, 200, 40], [80, 210, 90], [210, 90, 230], [250, 140, 50],
                    [60, 220, 210]])  # fmt: skip


def paint(image: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Tint each mask [M, H, W] on an image [H, W, 3] and line its edge; smaller masks lie on top."""
    painted = image.copy()
    thickness = max(1, round(max(image.shape) / 300))
    for i in np.argsort(-masks.reshape(len(masks), -1).sum(1)):
        colour = COLOURS[i % len(COLOURS)]
        painted[masks[i]] = (0.5 * painted[masks[i]] + 0.5 * colour).astype(np.uint8)
        outlines, _ = cv2.findContours(masks[i].astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(painted, outlines, -1, colour.tolist(), thickness)
    return painted


def mark(image: np.ndarray, points: list[tuple[int, int]]) -> np.ndarray:
    for x, y in points:
        radius = round(max(image.shape) / 90)
        cv2.circle(image, (x, y), radius + 2, (0, 0, 0), -1)
        cv2.circle(image, (x, y), radius, (255, 255, 255), -1)
    return image


def find_masks(session: Session, prompts: Prompts) -> np.ndarray:
    """The best-rated of three masks for each prompt: [M, H, W] bool."""
    logits, predicted = session.predict(prompts, None)
    best = 1 + predicted[:, 1:].argmax(1)
    return session.masks(logits[torch.arange(len(best)), best])


@torch.inference_mode()
def draw_panels(session: Session, example: Example) -> np.ndarray:
    """Four panels in a row: [h, 4w, 3] uint8."""
    centres = [find_centre(mask) for mask in example.masks]
    boxes = []
    for mask in example.masks:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        boxes.append([(float(columns[0]), float(rows[0])), (float(columns[-1]) + 1, float(rows[-1]) + 1)])
    clicks = session.prompts([[(float(x), float(y)), (0.0, 0.0)] for x, y in centres], [[1, -1]] * len(centres))
    by_click = find_masks(session, clicks)
    by_box = find_masks(session, session.prompts(boxes, [[2, 3]] * len(boxes)))
    panels = [
        example.image,
        paint(example.image, example.masks),
        mark(paint(example.image, by_click), centres),
        paint(example.image, by_box),
    ]
    height = round(PANEL_PX * example.image.shape[0] / example.image.shape[1])
    return np.concatenate([cv2.resize(p, (PANEL_PX, height), interpolation=cv2.INTER_AREA) for p in panels], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED_CHECKPOINT)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    sam = load_model(arguments.checkpoint, torch.device("cpu"))
    rows = []
    for example in read_photographs():
        with torch.inference_mode():
            session = Session(sam, example.image, 1024)
        rows.append(draw_panels(session, example))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(arguments.output, quality=82)


if __name__ == "__main__":
    main()
