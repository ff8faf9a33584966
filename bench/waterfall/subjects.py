"""The models that are measured, and the images and clicks they are given."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from splitsam.common.architectures import ARCHITECTURES, Architecture, build_sam
from splitsam.common.checkpoints import DEMONSTRATION_MODEL, load_model
from splitsam.common.errors import CheckpointError
from splitsam.common.sam_modules import Sam
from splitsam.common.settings import DEFAULT_CACHE_DIR
from splitsam.common.shapes import IMAGE_SIDE_PX
from training.evaluate import draw_held, find_centre

SEED = 3
OBJECTS = 6  # in a drawn scene, at most, as training.evaluate asks for
OUTLIER_CHANNELS = 6
OUTLIER_FACTOR = 30.0
Clicks = list[torch.Tensor]


@dataclass(frozen=True)
class Subject:
    """A model with its weights, fp32 on the CPU, and what to call the two."""

    name: str
    weights: str
    sam: Sam

    @property
    def trained(self) -> bool:
        return self.weights.startswith("trained")


@dataclass(frozen=True)
class HeldOut:
    """Drawn scenes that vit_t was not trained on: [H, W, 3] uint8 with a longer side of 1024, and clicks (x, y)."""

    images: list[np.ndarray]
    clicks: Clicks


def load_subject(model: str, checkpoint: str | None, outliers: bool) -> Subject:
    """The weights of a checkpoint, those shipped for vit_t, or else random ones.

    Raises:
        CheckpointError: the checkpoint does not fit, or is no longer what it was trained to be.
    """
    if checkpoint is not None or model == DEMONSTRATION_MODEL:
        loaded = load_model(model=model, checkpoint=checkpoint, sha256=None, cache_dir=DEFAULT_CACHE_DIR)
        if loaded.optimisation is not None:
            raise CheckpointError(f"{loaded.path} is already optimised, for {loaded.optimisation.precision}")
        sam, weights = loaded.sam, "trained"
    else:
        sam, weights = build_random(ARCHITECTURES[model]), "random"
    if outliers:
        inject_outliers(sam)
    return Subject(model, f"{weights}+outliers" if outliers else weights, sam)


def build_random(architecture: Architecture) -> Sam:
    """Seeded weights, position tables included, which start as zeros and would hide a rung that ignores them."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)
        sam = build_sam(architecture)
        for name, parameter in sam.image_encoder.named_parameters():
            parameter.requires_grad_(False)
            if "rel_pos" in name:
                parameter.normal_(std=0.2)
            elif "pos_embed" in name:
                parameter.normal_(std=0.02)
    return sam.requires_grad_(False)


@torch.no_grad()
def inject_outliers(sam: Sam) -> None:
    """Make a few channels of what enters each linear layer of a block thirty times larger, and its answer the same.

    The layer before is scaled up in those channels and the layer itself down. Trained transformers have such channels,
    and 8 bits have to cope with them; in exact arithmetic the embeddings do not change. GELU lets nothing through
    unchanged, so the second layer of an MLP is left out.
    """
    generator = torch.Generator().manual_seed(SEED)
    block: Any
    for block in sam.image_encoder.blocks:
        width = block.norm1.weight.shape[0]
        channels = torch.randperm(width, generator=generator)[:OUTLIER_CHANNELS]
        for norm, linear in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.lin1)):
            norm.weight[channels] *= OUTLIER_FACTOR
            norm.bias[channels] *= OUTLIER_FACTOR
            linear.weight[:, channels] /= OUTLIER_FACTOR
        values = 2 * width + channels
        block.attn.qkv.weight[values] *= OUTLIER_FACTOR
        block.attn.qkv.bias[values] *= OUTLIER_FACTOR
        block.attn.proj.weight[:, channels] /= OUTLIER_FACTOR


def draw_held_out(scenes: int, cache: Path | None = None) -> HeldOut:
    """The scenes of training.evaluate, each object clicked once in its middle; drawing one takes seconds.

    Args:
        cache: an .npz file to keep the scenes in.
    """
    if cache is not None and cache.exists():
        with np.load(cache) as kept:
            if len(kept.files) >= 2 * scenes:
                numbers = range(scenes)
                return HeldOut(
                    [kept[f"image{i}"] for i in numbers], [torch.from_numpy(kept[f"clicks{i}"]) for i in numbers]
                )
    examples = list(draw_held(scenes, OBJECTS, None, torch.device("cpu")))
    clicks = [np.array([find_centre(mask) for mask in example.masks], np.float32) for example in examples]
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {f"image{i}": example.image for i, example in enumerate(examples)}
        arrays |= {f"clicks{i}": points for i, points in enumerate(clicks)}
        np.savez_compressed(cache, **arrays)
    return HeldOut([example.image for example in examples], [torch.from_numpy(points) for points in clicks])


def prepare_image(sam: Sam, image: np.ndarray) -> torch.Tensor:
    """[H, W, 3] uint8 to [3, 1024, 1024] float32, as `Sam.preprocess`."""
    prepared: torch.Tensor = sam.preprocess(torch.from_numpy(image).permute(2, 0, 1))
    return prepared


def draw_noise(count: int) -> torch.Tensor:
    """[count, 3, 1024, 1024] float32: the i-th image is the same for every count."""
    shape = (3, IMAGE_SIDE_PX, IMAGE_SIDE_PX)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(SEED + i)) for i in range(count)])


def draw_clicks(count: int, mean: int) -> Clicks:
    """For each image [n, 2] float32 clicks (x, y) of the 1024 px frame; n is uneven, from 1 to 2 mean - 1."""
    rng = np.random.default_rng(SEED)
    counts = rng.integers(1, 2 * mean, size=count)
    counts[0] = mean  # so that a batch of one has what was asked for
    return [torch.from_numpy(rng.uniform(0, IMAGE_SIDE_PX, (n, 2)).astype(np.float32)) for n in counts]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square over root mean square, of the worst image of [B, ...]; infinite when a number is not finite."""
    difference = (actual.float() - expected).flatten(1).square().mean(1).sqrt()
    worst = float((difference / expected.flatten(1).square().mean(1).sqrt()).max())
    return worst if math.isfinite(worst) else math.inf
