"""The materials of one draw, as tensors on the device: cut-outs, photographs, silhouettes, textures."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from training import shapes, textures

CUTOUT_PX = 320
PHOTOGRAPH_PX = 768
FILL_PX = 384
SILHOUETTE_PX = 256
CUTOUT_ODDS = 2.5


@dataclass(frozen=True)
class Materials:
    """What scenes are drawn from.

    cutouts: [C, 5, 320, 320] uint8, RGB, alpha and part label; centred, longest side filling the square
    cutout_odds: [C] float64, how often to draw each; sums to 1
    photographs: [P, 4, 768, 768] uint8, RGB and region label, squeezed to a square
    photograph_aspect: [P] float32, width over height before that
    silhouettes: [S, 256, 256] float32, signed fields
    horizons: [H, 256, 256] float32, signed fields
    drawings: [D, 3, 384, 384] uint8, RGB: photographs and drawn wallpapers, as textures
    fills: [D + T, 3, 384, 384] uint8, RGB: the drawings, then procedural textures
    """

    cutouts: torch.Tensor
    cutout_odds: np.ndarray
    photographs: torch.Tensor
    photograph_aspect: np.ndarray
    silhouettes: torch.Tensor
    horizons: torch.Tensor
    drawings: torch.Tensor
    fills: torch.Tensor


@dataclass(frozen=True)
class Families:
    """Which silhouettes and which textures may be drawn, and how many of each family at a time."""

    shapes: tuple[str, ...]
    textures: tuple[str, ...]
    each: int


TRAINED = Families(shapes.TRAINED_FAMILIES, textures.TRAINED_FAMILIES, each=24)
HELD = Families(shapes.HELD_FAMILIES, textures.HELD_FAMILIES, each=24)


def load_cutout(path: Path) -> np.ndarray:
    """Centre a cut-out on its square: [5, 320, 320] uint8."""
    rgba = Image.open(path).convert("RGBA")
    scale = CUTOUT_PX / max(rgba.size)
    size = (max(1, round(rgba.width * scale)), max(1, round(rgba.height * scale)))
    square = np.zeros((CUTOUT_PX, CUTOUT_PX, 5), np.uint8)
    left, top = (CUTOUT_PX - size[0]) // 2, (CUTOUT_PX - size[1]) // 2
    inside = square[top : top + size[1], left : left + size[0]]
    inside[..., :4] = np.asarray(rgba.resize(size, Image.Resampling.BICUBIC))
    parts = Image.open(path.with_suffix(".parts.png"))
    inside[..., 4] = np.asarray(parts.resize(size, Image.Resampling.NEAREST))
    return square.transpose(2, 0, 1)


def load_photograph(path: Path) -> tuple[np.ndarray, float]:
    """Squeeze a photograph to the square: ([4, 768, 768] uint8, width over height)."""
    image = Image.open(path).convert("RGB")
    square = (PHOTOGRAPH_PX, PHOTOGRAPH_PX)
    parts = Image.open(path.with_suffix(".parts.png")).resize(square, Image.Resampling.NEAREST)
    pixels = np.dstack([np.asarray(image.resize(square, Image.Resampling.LANCZOS)), np.asarray(parts)])
    return pixels.transpose(2, 0, 1), image.width / image.height


def load_drawing(path: Path) -> np.ndarray:
    """Squeeze an image to the square of the fills: [3, 384, 384] uint8."""
    image = Image.open(path).convert("RGB").resize((FILL_PX, FILL_PX), Image.Resampling.LANCZOS)
    return np.asarray(image).transpose(2, 0, 1)


def load_pool(folder: Path, families: Families, rng: np.random.Generator, device: torch.device) -> Materials:
    """Read one half of a pool (its folder `train` or `held`) and draw the first procedural materials."""
    with ThreadPoolExecutor() as threads:
        cutouts = list(threads.map(load_cutout, sorted((folder / "cutouts").glob("*.webp"))))
        renders = list(threads.map(load_cutout, sorted((folder / "renders").glob("*.webp"))))
        photographs = list(threads.map(load_photograph, sorted((folder / "photographs").glob("*.jpg"))))
        drawings = list(threads.map(load_drawing, sorted(folder.glob("[dp]*/*.jpg"))))
    odds = np.concatenate([np.full(len(cutouts), CUTOUT_ODDS), np.ones(len(renders))])
    return redraw(
        replace(
            draw_procedural(families, rng, device),
            cutouts=torch.from_numpy(np.stack(cutouts + renders)).to(device),
            cutout_odds=odds / odds.sum(),
            photographs=torch.from_numpy(np.stack([pixels for pixels, _ in photographs])).to(device),
            photograph_aspect=np.array([aspect for _, aspect in photographs], np.float32),
            drawings=torch.from_numpy(np.stack(drawings)).to(device),
        ),
        families,
        rng,
    )


def draw_procedural(families: Families, rng: np.random.Generator, device: torch.device) -> Materials:
    """Materials that need no file: silhouettes and textures, no cut-out and no photograph."""
    return redraw(
        Materials(
            cutouts=torch.zeros(0, 5, CUTOUT_PX, CUTOUT_PX, dtype=torch.uint8, device=device),
            cutout_odds=np.zeros(0),
            photographs=torch.zeros(0, 4, PHOTOGRAPH_PX, PHOTOGRAPH_PX, dtype=torch.uint8, device=device),
            photograph_aspect=np.zeros(0, np.float32),
            silhouettes=torch.zeros(0, device=device),
            horizons=torch.zeros(0, device=device),
            drawings=torch.zeros(0, 3, FILL_PX, FILL_PX, dtype=torch.uint8, device=device),
            fills=torch.zeros(0, device=device),
        ),
        families,
        rng,
    )


def redraw(materials: Materials, families: Families, rng: np.random.Generator) -> Materials:
    """The same cut-outs, photographs and drawings with fresh silhouettes, horizons and textures."""
    device = materials.photographs.device
    fresh = textures.draw_textures(families.textures, families.each, FILL_PX, rng, device)
    return replace(
        materials,
        silhouettes=shapes.draw_silhouettes(families.shapes, families.each, SILHOUETTE_PX, rng, device),
        horizons=shapes.draw_horizons(families.each, SILHOUETTE_PX, rng, device),
        fills=torch.cat([materials.drawings, fresh]),
    )
