"""Divide a photograph into a few regions of one colour: superpixels, merged greedily by Ward's criterion.

The regions stand in for objects nobody has outlined: parts of a cut-out, the sky, a leaf on a blurred background.
"""

import heapq

import cv2
import numpy as np

WORKING_SIDE_PX = 256
SEED_SPACING_PX = 7
SMALLEST_SHARE = 0.01


def make_superpixels(lab: np.ndarray) -> np.ndarray:
    """Flood a grid of seeds along the weakest edges: [H, W, 3] uint8 to [H, W] int32 labels from 1."""
    smooth = cv2.bilateralFilter(lab, 7, 24, 5)
    height, width = lab.shape[:2]
    seeds = np.zeros((height, width), np.int32)
    grid_y, grid_x = np.mgrid[
        SEED_SPACING_PX // 2 : height : SEED_SPACING_PX, SEED_SPACING_PX // 2 : width : SEED_SPACING_PX
    ]
    seeds[grid_y, grid_x] = np.arange(1, grid_y.size + 1).reshape(grid_y.shape)
    labels = cv2.watershed(smooth, seeds)
    for _ in range(2):
        grown = cv2.dilate(labels.astype(np.float32), np.ones((3, 3), np.uint8)).astype(np.int32)
        labels = np.where(labels <= 0, grown, labels)
    return np.maximum(labels, 1)


def find_neighbours(labels: np.ndarray, usable: np.ndarray) -> dict[int, set[int]]:
    """Which labels touch which, over the pixels where `usable` [H, W] bool holds."""
    neighbours: dict[int, set[int]] = {}
    for first, second, both in (
        (labels[:, :-1], labels[:, 1:], usable[:, :-1] & usable[:, 1:]),
        (labels[:-1], labels[1:], usable[:-1] & usable[1:]),
    ):
        for left, right in np.unique(np.stack([first[both], second[both]], 1), axis=0).tolist():
            if left != right:
                neighbours.setdefault(left, set()).add(right)
                neighbours.setdefault(right, set()).add(left)
    return neighbours


def merge_superpixels(labels: np.ndarray, lab: np.ndarray, usable: np.ndarray, keep: int) -> np.ndarray:
    """Merge touching labels, the pair that adds least colour variance first, until `keep` are left.

    Returns: [labels.max() + 1] int64, the label that each label was merged into.
    """
    size = np.bincount(labels[usable], minlength=labels.max() + 1).astype(float)
    mean = (
        np.stack(
            [np.bincount(labels[usable], lab[..., c][usable].astype(float), labels.max() + 1) for c in range(3)], 1
        )
        / np.maximum(size, 1)[:, None]
    )
    neighbours = find_neighbours(labels, usable)
    target = np.arange(len(size))
    version = np.zeros(len(size), int)

    def cost(a: int, b: int) -> float:
        return float(size[a] * size[b] / (size[a] + size[b]) * ((mean[a] - mean[b]) ** 2).sum())

    heap = [(cost(a, b), a, b, 0, 0) for a in neighbours for b in neighbours[a] if a < b]
    heapq.heapify(heap)
    left = int((size > 0).sum())
    while heap and left > keep:
        _, a, b, version_a, version_b = heapq.heappop(heap)
        if version[a] != version_a or version[b] != version_b:
            continue
        mean[a] = (mean[a] * size[a] + mean[b] * size[b]) / (size[a] + size[b])
        size[a] += size[b]
        target[target == b] = a
        version[a] += 1
        version[b] = -1
        left -= 1
        neighbours[a] = (neighbours[a] | neighbours.pop(b)) - {a, b}
        for other in neighbours[a]:
            neighbours[other] = (neighbours[other] - {b}) | {a}
            heapq.heappush(heap, (cost(a, other), a, other, int(version[a]), int(version[other])))
    return target


def divide_into_regions(image: np.ndarray, keep: int, mask: np.ndarray | None = None) -> np.ndarray:
    """Divide an image into at most `keep` connected regions of one colour.

    Args:
        image: [H, W, 3] uint8, RGB.
        keep: the largest label to give out.
        mask: [H, W] bool, the pixels to divide; None for all.

    Returns: [H, W] uint8, labels from 1 up; 0 outside the mask and in regions too small to matter.
    """
    height, width = image.shape[:2]
    scale = min(1.0, WORKING_SIDE_PX / max(height, width))
    small_size = (max(8, round(width * scale)), max(8, round(height * scale)))
    lab = cv2.cvtColor(cv2.resize(image, small_size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2LAB)
    full = np.ones((height, width), bool) if mask is None else mask
    usable = cv2.resize(full.astype(np.uint8), small_size, interpolation=cv2.INTER_NEAREST) > 0
    labels = make_superpixels(lab)
    merged = merge_superpixels(labels, lab, usable, keep)[labels]
    sizes = {label: float((usable & (merged == label)).sum()) for label in np.unique(merged[usable]).tolist()}
    kept = [label for label, size in sizes.items() if size >= SMALLEST_SHARE * usable.sum()][:keep]
    best = np.full((height, width), 0.35, np.float32)
    result = np.zeros((height, width), np.uint8)
    for number, label in enumerate(kept, 1):
        share = cv2.resize(((merged == label) & usable).astype(np.float32), (width, height))
        share = cv2.GaussianBlur(share, (0, 0), 0.6 / scale)
        result[share > best] = number
        best = np.maximum(best, share)
    return np.where(full, result, 0).astype(np.uint8)
