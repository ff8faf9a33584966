"""Procedural textures: a field over the plane, coloured by a small palette.

The families of `HELD_FAMILIES` are never trained on.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from training.shapes import column, make_grid

TRAINED_FAMILIES = ("clouds", "stripes", "dots", "gradient", "grain")
HELD_FAMILIES = ("cells", "rings", "bricks")


def draw_noise(count: int, side_px: int, rng: np.random.Generator, device: torch.device, decay: float) -> torch.Tensor:
    """Value noise in octaves of 4 to 128 cells, each `decay` times weaker than the last: [count, side, side]."""
    total = torch.zeros(count, 1, side_px, side_px, device=device)
    for octave, cells in enumerate((4, 8, 16, 32, 64, 128)):
        values = torch.from_numpy(rng.standard_normal((count, 1, cells, cells), np.float32)).to(device)
        total += decay**octave * F.interpolate(values, (side_px, side_px), mode="bilinear")
    return total[:, 0]


def turn(x: torch.Tensor, y: torch.Tensor, rng: np.random.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinates turned by a random angle for each texture."""
    angle = rng.uniform(0, math.pi, count)
    cos, sin = column(np.cos(angle), x.device), column(np.sin(angle), x.device)
    return x * cos + y * sin, y * cos - x * sin


def draw_clouds(x: torch.Tensor, _: torch.Tensor, rng: np.random.Generator, count: int) -> torch.Tensor:
    return torch.sigmoid(1.5 * draw_noise(count, x.shape[-1], rng, x.device, float(rng.uniform(0.45, 0.8))))


def draw_stripes(x: torch.Tensor, y: torch.Tensor, rng: np.random.Generator, count: int) -> torch.Tensor:
    along, _ = turn(x, y, rng, count)
    bend = column(rng.uniform(0, 0.15, count), x.device) * draw_noise(count, x.shape[-1], rng, x.device, 0.4)
    wave = torch.sin((along + bend) * column(rng.uniform(8, 70, count), x.device))
    return torch.sigmoid(wave * column(rng.uniform(1, 8, count), x.device))


def draw_dots(x: torch.Tensor, y: torch.Tensor, rng: np.random.Generator, count: int) -> torch.Tensor:
    along, across = turn(x, y, rng, count)
    pitch = column(rng.uniform(8, 50, count), x.device)
    wave = torch.sin(along * pitch) * torch.sin(across * pitch)
    return torch.sigmoid((wave - column(rng.uniform(-0.4, 0.6, count), x.device)) * 8)


def draw_gradient(x: torch.Tensor, y: torch.Tensor, rng: np.random.Generator, count: int) -> torch.Tensor:
    along, across = turn(x, y, rng, count)
    round_share = column(rng.random(count), x.device)
    bowl = along.square() + across.square() - 0.7
    return (0.5 + 0.4 * along * (1 - round_share) - 0.4 * round_share * bowl).clamp(0, 1)


def draw_grain(x: torch.Tensor, _: torch.Tensor, rng: np.random.Generator, count: int) -> torch.Tensor:
    fine = torch.from_numpy(rng.standard_normal((count, x.shape[-1], x.shape[-1]), np.float32)).to(x.device)
    smooth = draw_noise(count, x.shape[-1], rng, x.device, 0.5)
    return torch.sigmoid(0.5 * smooth + column(rng.uniform(0.05, 0.9, count), x.device) * fine)


def draw_cells(x: torch.Tensor, y: torch.Tensor, rng: np.random.Generator, count: int) -> torch.Tensor:
    """Voronoi cells, each of one tone, with dark seams."""
    first = torch.full((count, *x.shape[1:]), 9.0, device=x.device)
    second, tone = first.clone(), torch.zeros_like(first)
    for _ in range(24):
        distance = torch.hypot(
            x - column(rng.uniform(-1.1, 1.1, count), x.device), y - column(rng.uniform(-1.1, 1.1, count), x.device)
        )
        nearer = distance < first
        second = torch.where(nearer, first, torch.minimum(second, distance))
        tone = torch.where(nearer, column(rng.random(count), x.device), tone)
        first = torch.where(nearer, distance, first)
    return tone * ((second - first) * 40).clamp(0, 1)


def draw_rings(x: torch.Tensor, y: torch.Tensor, rng: np.random.Generator, count: int) -> torch.Tensor:
    """Wood: warped rings around a point outside the middle."""
    shift = column(rng.uniform(-2, 2, count), x.device)
    radius = torch.hypot(x - shift, y * column(rng.uniform(0.2, 1, count), x.device))
    warp = 0.05 * draw_noise(count, x.shape[-1], rng, x.device, 0.6)
    return torch.remainder((radius + warp) * column(rng.uniform(4, 16, count), x.device), 1.0)


def draw_bricks(x: torch.Tensor, y: torch.Tensor, rng: np.random.Generator, count: int) -> torch.Tensor:
    """Rows of bricks with pale joints."""
    along, across = turn(x, y, rng, count)
    rows = across * column(rng.uniform(4, 14, count), x.device)
    cells = along * column(rng.uniform(2, 8, count), x.device) + 0.5 * torch.remainder(rows.floor(), 2)
    joint = torch.minimum(torch.remainder(rows, 1.0), torch.remainder(cells, 1.0)) < 0.1
    tone = torch.remainder(torch.sin(rows.floor() * 12.9 + cells.floor() * 78.2) * 437.5, 1.0)
    return torch.where(joint, torch.ones_like(tone), 0.7 * tone)


FAMILIES: dict[str, Callable[[torch.Tensor, torch.Tensor, np.random.Generator, int], torch.Tensor]] = {
    "clouds": draw_clouds,
    "stripes": draw_stripes,
    "dots": draw_dots,
    "gradient": draw_gradient,
    "grain": draw_grain,
    "cells": draw_cells,
    "rings": draw_rings,
    "bricks": draw_bricks,
}


def draw_palette(count: int, rng: np.random.Generator) -> np.ndarray:
    """Three colours for each texture, often relatives: [count, 3 colours, RGB] float32 in 0..1."""
    base = rng.random((count, 1, 3))
    grey = base.mean(-1, keepdims=True)
    base = grey + (base - grey) * rng.uniform(0.1, 1.0, (count, 1, 1))
    spread = rng.choice([0.06, 0.2, 0.5], (count, 1, 1))
    palette: np.ndarray = np.clip(base + spread * rng.normal(0, 1, (count, 3, 3)), 0, 1).astype(np.float32)
    return palette


def draw_textures(
    families: tuple[str, ...], each: int, side_px: int, rng: np.random.Generator, device: torch.device
) -> torch.Tensor:
    """Draw `each` textures of every family: [families * each, 3, side, side] uint8, RGB."""
    x, y = make_grid(side_px, device)
    drawn = []
    for family in families:
        field = FAMILIES[family](x, y, rng, each)[:, None].clamp(0, 1)
        low, middle, high = torch.from_numpy(draw_palette(each, rng)).to(device)[..., None, None].unbind(1)
        below = low + (middle - low) * (field * 2).clamp(max=1)
        drawn.append((below + (high - middle) * (field * 2 - 1).clamp(min=0)).mul(255).byte())
    return torch.cat(drawn)
