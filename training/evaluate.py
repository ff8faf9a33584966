"""Measure a checkpoint on drawn scenes never trained on and on photographs with masks drawn by hand.

    python -m training.evaluate --checkpoint common/assets/vit_t.safetensors

Prompts have no chance in them: the click is the pixel farthest from the object's outline, the box its exact bounds, the
corrective click the middle of the largest error. Masks are compared at the image's own resolution. "oracle" is the best
of the three masks, "predicted" the one the model itself rates best, "single" the single-mask output.
"""

import argparse
import csv
import json
import platform
import shlex
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from splitsam.common.architectures import ARCHITECTURES, build_sam
from training.batched import FRAME_PX, decode, embed_masks, embed_points, encode, normalise
from training.objects import choose_targets
from training.photographs import load_photographs
from training.pool import HELD, draw_procedural, load_pool
from training.prompts import Prompts, insert
from training.scenes import draw_scenes

SHIPPED_CHECKPOINT = Path(__file__).parents[1] / "common/assets/vit_t.safetensors"
HELD_SEED = 20_000
SIZE_CLASSES = (("small", 0.01), ("medium", 0.1), ("large", 1.0))
SETS = ("photographs", "drawn", "drawn_with_held_cutouts")
FIGURES = (
    "click_oracle",
    "click_predicted",
    "click_single",
    "click_corrected",
    "click_corrected_twice",
    "box_oracle",
    "box_predicted",
    "box_single",
    "box_corrected",
)


@dataclass(frozen=True)
class Example:
    """An image and its objects.

    image: [H, W, 3] uint8
    masks: [M, H, W] bool
    """

    name: str
    image: np.ndarray
    masks: np.ndarray


@dataclass(frozen=True)
class Row:
    """What one object scored: the share of the image it covers and an IoU for each name of `FIGURES`."""

    image: str
    object: int
    share: float
    scores: dict[str, float]


def find_centre(mask: np.ndarray) -> tuple[int, int]:
    """The pixel (x, y) farthest from the outline of a mask [H, W] bool, the image's border counting as outline."""
    padded = np.pad(mask.astype(np.uint8), 1)
    distance = cv2.distanceTransform(padded, cv2.DIST_L2, 5)[1:-1, 1:-1]
    y, x = np.unravel_index(int(distance.argmax()), distance.shape)
    return int(x), int(y)


def find_correction(found: np.ndarray, wanted: np.ndarray) -> tuple[int, int, int]:
    """A corrective click (x, y, label): the middle of the largest connected error."""
    best = (0, *find_centre(wanted), 1)
    for label, error in ((1, wanted & ~found), (0, found & ~wanted)):
        _, parts, stats, _ = cv2.connectedComponentsWithStats(error.astype(np.uint8), connectivity=4)
        if len(stats) > 1:
            largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
            area = int(stats[largest, cv2.CC_STAT_AREA])
            if area > best[0]:
                best = (area, *find_centre(parts == largest), label)
    return best[1:]


def measure_iou(found: np.ndarray, wanted: np.ndarray) -> float:
    return float((found & wanted).sum() / max(1, (found | wanted).sum()))


class Session:
    """One embedded image: prompts in, masks at the image's own resolution out."""

    def __init__(self, sam: Any, image: np.ndarray, side_px: int) -> None:
        device = sam.device
        height, width = image.shape[:2]
        self.sam, self.size = sam, (height, width)
        self.scale = FRAME_PX / max(height, width)
        inner = (round(height * side_px / max(height, width)), round(width * side_px / max(height, width)))
        pixels = torch.from_numpy(image).to(device).permute(2, 0, 1)[None].float()
        pixels = F.interpolate(pixels, inner, mode="bilinear", antialias=True)
        framed = F.pad(pixels, (0, side_px - inner[1], 0, side_px - inner[0]))
        valid = torch.zeros(1, 1, side_px, side_px, dtype=torch.bool, device=device)
        valid[..., : inner[0], : inner[1]] = True
        self.embedding = encode(sam, normalise(sam, framed, valid))
        self.position = sam.prompt_encoder.pe_layer(self.embedding.shape[-2:])[None]
        self.inner_share = (inner[0] / side_px, inner[1] / side_px)

    def predict(self, prompts: Prompts, last: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [N, 4, G, G] and predicted IoU [N, 4]; `last` [N, G, G] are the logits of the round before."""
        encoder, count = self.sam.prompt_encoder, len(prompts.points)
        side = 4 * self.embedding.shape[-1]
        given = torch.zeros(count, side, side, device=self.sam.device) if last is None else last
        use = torch.full((count,), last is not None, device=self.sam.device)
        dense = embed_masks(encoder, given[:, None], use)
        sparse = embed_points(encoder, prompts.points, prompts.labels)
        present = torch.ones(sparse.shape[1], dtype=torch.bool, device=self.sam.device)
        return decode(self.sam.mask_decoder, self.embedding, self.position, sparse, dense, present)

    def masks(self, logits: torch.Tensor) -> np.ndarray:
        """Logits [..., G, G] of the padded frame to masks [..., H, W] bool of the image."""
        flat = F.interpolate(logits.flatten(0, -3)[:, None].float(), (FRAME_PX, FRAME_PX), mode="bilinear")
        height, width = (round(share * FRAME_PX) for share in self.inner_share)
        cut = flat[..., :height, :width]
        if self.size != (height, width):
            cut = F.interpolate(cut, self.size, mode="bilinear")
        return (cut > 0).cpu().numpy().reshape(*logits.shape[:-2], *self.size)

    def prompts(self, points: list[list[tuple[float, float]]], labels: list[list[int]]) -> Prompts:
        """Points in the image's pixels to prompts in the frame's."""
        scaled = (torch.tensor(points, dtype=torch.float32) + 0.5) * self.scale - 0.5
        return Prompts(scaled.to(self.sam.device), torch.tensor(labels, device=self.sam.device))


def correct(session: Session, prompts: Prompts, found: np.ndarray, wanted: np.ndarray) -> Prompts:
    clicks = [find_correction(f, w) for f, w in zip(found, wanted, strict=True)]
    extra = session.prompts([[(x, y)] for x, y, _ in clicks], [[label] for *_, label in clicks])
    return insert(prompts, extra.points, extra.labels)


def score_kind(
    session: Session, kind: str, prompts: Prompts, wanted: np.ndarray, rounds: int
) -> list[dict[str, float]]:
    """Prompt all objects of an image in one way and correct it `rounds` times: figures for each object."""
    scores: list[dict[str, float]] = [{} for _ in wanted]
    logits, predicted = session.predict(prompts, None)
    masks = session.masks(logits)
    best = 1 + predicted[:, 1:].argmax(1)
    for i, score in enumerate(scores):
        ious = [measure_iou(mask, wanted[i]) for mask in masks[i]]
        score[f"{kind}_oracle"], score[f"{kind}_predicted"] = max(ious[1:]), ious[int(best[i])]
        score[f"{kind}_single"] = ious[0]
    rows = torch.arange(len(best), device=best.device)
    last, found = logits[rows, best], masks[np.arange(len(best)), best.cpu().numpy()]
    for suffix in ("corrected", "corrected_twice")[:rounds]:
        prompts = correct(session, prompts, found, wanted)
        last = session.predict(prompts, last)[0][:, 0]
        found = session.masks(last)
        for i, score in enumerate(scores):
            score[f"{kind}_{suffix}"] = measure_iou(found[i], wanted[i])
    return scores


@torch.inference_mode()
def score_example(sam: Any, example: Example, side_px: int) -> list[Row]:
    """All figures of all objects of one image."""
    session = Session(sam, example.image, side_px)
    clicks, boxes = [], []
    for mask in example.masks:
        x, y = find_centre(mask)
        clicks.append([(float(x), float(y)), (0.0, 0.0)])
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        boxes.append([(float(columns[0]), float(rows[0])), (float(columns[-1]) + 1, float(rows[-1]) + 1)])
    first = score_kind(session, "click", session.prompts(clicks, [[1, -1]] * len(clicks)), example.masks, 2)
    second = score_kind(session, "box", session.prompts(boxes, [[2, 3]] * len(boxes)), example.masks, 1)
    return [
        Row(example.name, i, float(mask.mean()), {**a, **b})
        for i, (mask, a, b) in enumerate(zip(example.masks, first, second, strict=True))
    ]


def draw_held(count: int, objects: int, pool: Path | None, device: torch.device) -> Iterable[Example]:
    """Scenes from seeds and families never trained on; with a pool, from its held-out cut-outs and photographs too."""
    rng = np.random.default_rng(HELD_SEED)
    materials = load_pool(pool / "held", HELD, rng, device) if pool else draw_procedural(HELD, rng, device)
    for number in range(count):
        scene_rng = np.random.default_rng(HELD_SEED + 1 + number)
        scenes = draw_scenes(materials, 1, FRAME_PX, scene_rng)
        generator = torch.Generator(device).manual_seed(HELD_SEED + number)
        targets = choose_targets(scenes, objects, generator, parts=False)
        valid = scenes.valid[0, 0]
        height, width = int(valid.any(1).sum()), int(valid.any(0).sum())
        image = scenes.images[0, :, :height, :width].round().byte().permute(1, 2, 0).cpu().numpy()
        masks = targets.masks[0, targets.weight[0] > 0, :height, :width].cpu().numpy()
        # Packed, because comparing whole masks takes seconds.
        _, first = np.unique(np.packbits(masks.reshape(len(masks), -1), axis=1), axis=0, return_index=True)
        if len(first):
            yield Example(f"scene{number:03d}", image, masks[first])


def read_photographs() -> Iterable[Example]:
    for photograph in load_photographs():
        yield Example(photograph.name, photograph.image, np.stack(photograph.masks))


def summarise(rows: list[Row]) -> list[dict[str, Any]]:
    """Means over all objects and over each class of size."""
    groups = [("all", rows)]
    low = 0.0
    for name, high in SIZE_CLASSES:
        groups.append((name, [row for row in rows if low <= row.share < high]))
        low = high
    return [
        {
            "objects": name,
            "count": len(group),
            **{figure: round(float(np.mean([row.scores[figure] for row in group])), 4) for figure in FIGURES},
        }
        for name, group in groups
        if group
    ]


def print_table(title: str, summary: list[dict[str, Any]]) -> None:
    print(f"\n{title}\n{'objects':8} {'n':>4} " + " ".join(f"{name[:21]:>21}" for name in FIGURES))
    for line in summary:
        print(f"{line['objects']:8} {line['count']:4d} " + " ".join(f"{line[name]:21.3f}" for name in FIGURES))


def write_results(folder: Path, name: str, rows: list[Row]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "object", "share", *FIGURES])
        for row in rows:
            writer.writerow([row.image, row.object, f"{row.share:.5f}", *(f"{row.scores[f]:.4f}" for f in FIGURES)])


def load_model(checkpoint: Path, device: torch.device) -> Any:
    """Build vit_t from a file of half-precision weights, in float32."""
    sam = build_sam(ARCHITECTURES["vit_t"])
    sam.load_state_dict({key: value.float() for key, value in load_file(checkpoint).items()}, strict=True)
    return sam.to(device).eval()


def evaluate(sam: Any, arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Score every set, print its table and write its rows; returns the summaries by set."""
    sets: dict[str, Iterable[Example]] = {
        "photographs": read_photographs(),
        "drawn": draw_held(arguments.scenes, arguments.objects, None, sam.device),
    }
    if arguments.pool:
        sets["drawn_with_held_cutouts"] = draw_held(arguments.scenes, arguments.objects, arguments.pool, sam.device)
    summaries = {}
    for name in arguments.sets or sets:
        examples = sets[name]
        start = time.monotonic()
        rows = [row for example in examples for row in score_example(sam, example, arguments.side)]
        summaries[name] = summarise(rows)
        print_table(f"{name} ({time.monotonic() - start:.0f} s)", summaries[name])
        if arguments.results:
            write_results(arguments.results, name, rows)
    return summaries


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED_CHECKPOINT)
    parser.add_argument("--results", type=Path, help="folder for a CSV of each set and evaluation.json")
    parser.add_argument("--pool", type=Path, help="also draw from the held-out half of this pool of materials")
    parser.add_argument("--sets", nargs="*", choices=SETS, help="only these sets")
    parser.add_argument("--scenes", type=int, default=32, help="drawn scenes in each drawn set")
    parser.add_argument("--objects", type=int, default=6, help="objects asked for in a drawn scene, at most")
    parser.add_argument("--side", type=int, default=FRAME_PX, help="resolution the image is encoded at")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    start = time.monotonic()
    summaries = evaluate(load_model(arguments.checkpoint, device), arguments)
    if arguments.results:
        environment = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": device.type,
            "threads": torch.get_num_threads(),
            "seconds": round(time.monotonic() - start),
        }
        record = {
            "command": shlex.join(["python", "-m", "training.evaluate", *sys.argv[1:]]),
            "scenes": arguments.scenes,
            "side": arguments.side,
            "environment": environment,
            "sets": summaries,
        }
        (arguments.results / "evaluation.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
