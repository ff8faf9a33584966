"""Silhouettes as signed fields: positive inside, zero on the outline, about a distance in local units.

Local coordinates run over [-1, 1] in x and y. The families of `HELD_FAMILIES` are never trained on.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch

TRAINED_FAMILIES = ("blob", "polygon", "superellipse", "ring", "stroke", "pair")
HELD_FAMILIES = ("gear", "leaf", "crescent", "letter")


def make_grid(side_px: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Local x and y of each pixel centre, both [1, side, side]."""
    line = (torch.arange(side_px, device=device) + 0.5) * (2 / side_px) - 1
    return line.view(1, 1, -1).expand(1, side_px, -1), line.view(1, -1, 1).expand(1, -1, side_px)


def column(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """[N] numbers as [N, 1, 1] float32."""
    return torch.from_numpy(np.asarray(values, np.float32)).to(device).view(-1, 1, 1)


def draw_radial(x: torch.Tensor, y: torch.Tensor, rng: np.random.Generator, count: int, waves: int) -> torch.Tensor:
    """Fourier outlines r(angle), from nearly round to amoeba-like: [count, side, side]."""
    angle, radius = torch.atan2(y, x), torch.sqrt(x * x + y * y)
    rough = rng.uniform(0.0, 0.35, count)
    outline = torch.full_like(x, 0.62).expand(count, -1, -1).clone()
    for k in range(2, waves + 2):
        size = column(rough * rng.normal(0, 1, count) / k, x.device)
        outline += 0.62 * size * torch.cos(k * angle + column(rng.uniform(0, 2 * math.pi, count), x.device))
    return outline.clamp(0.08, 0.97) - radius


def draw_polygon(x: torch.Tensor, y: torch.Tensor, rng: np.random.Generator, count: int) -> torch.Tensor:
    """Convex polygons of three to seven sides."""
    sides = rng.integers(3, 8, count)
    start = rng.uniform(0, 2 * math.pi, count)
    field = torch.full_like(x, 9.0).expand(count, -1, -1).clone()
    for k in range(7):
        angle = start + 2 * math.pi * (k + rng.uniform(-0.25, 0.25, count)) / sides
        reach = np.where(k < sides, rng.uniform(0.4, 0.8, count), 9.0)
        field = torch.minimum(
            field, column(reach, x.device) - x * column(np.cos(angle), x.device) - y * column(np.sin(angle), x.device)
        )
    return torch.minimum(field, 0.97 - torch.maximum(x.abs(), y.abs()))


def draw_superellipse(x: torch.Tensor, y: torch.Tensor, rng: np.random.Generator, count: int) -> torch.Tensor:
    """From a diamond over an ellipse to a rectangle with round corners."""
    power = column(rng.choice([1.2, 2.0, 2.0, 4.0, 12.0, 40.0], count), x.device)
    narrow = column(rng.uniform(0.15, 0.95, count), x.device)
    ratio = ((x.abs() / 0.95) ** power + (y.abs() / narrow) ** power) ** (1 / power)
    return (1 - ratio) * narrow


def draw_ring(x: torch.Tensor, y: torch.Tensor, rng: np.random.Generator, count: int) -> torch.Tensor:
    """A blob with one hole: frames, handles, wreaths."""
    outer = draw_radial(x, y, rng, count, 3)
    return torch.minimum(outer, column(rng.uniform(0.06, 0.4, count), x.device) - outer)


def draw_stroke(x: torch.Tensor, y: torch.Tensor, rng: np.random.Generator, count: int) -> torch.Tensor:
    """A bent line of even width, thin more often than thick: ropes, poles, stems."""
    points = np.cumsum(rng.normal(0, 0.45, (5, 2, count)), 0)
    points[:, 1] += np.linspace(-0.9, 0.9, 5)[:, None] * rng.choice([0, 1], count)
    points = np.clip(points - points.mean(0), -0.93, 0.93)
    width = column(np.exp(rng.uniform(math.log(0.012), math.log(0.14), count)), x.device)
    nearest = torch.full_like(x, 9.0).expand(count, -1, -1).clone()
    for start, end in pairwise(points):
        start_x, start_y = column(start[0], x.device), column(start[1], x.device)
        along_x, along_y = column(end[0] - start[0], x.device), column(end[1] - start[1], x.device)
        share = ((x - start_x) * along_x + (y - start_y) * along_y) / (along_x**2 + along_y**2 + 1e-6)
        share = share.clamp(0, 1)
        distance = torch.hypot(x - start_x - share * along_x, y - start_y - share * along_y)
        nearest = torch.minimum(nearest, distance)
    return width - nearest


def draw_pair(x: torch.Tensor, y: torch.Tensor, rng: np.random.Generator, count: int) -> torch.Tensor:
    """Two shapes grown together, or one cut out of the other."""
    shift_x, shift_y = (column(rng.uniform(-0.4, 0.4, count), x.device) for _ in range(2))
    first = draw_radial(x, y, rng, count, 4)
    second = draw_superellipse((x - shift_x) * 1.5, (y - shift_y) * 1.5, rng, count) / 1.5
    cut = column(rng.random(count) < 0.4, x.device) > 0
    return torch.where(cut, torch.minimum(first, -second), torch.maximum(first, second))


def draw_gear(x: torch.Tensor, y: torch.Tensor, rng: np.random.Generator, count: int) -> torch.Tensor:
    """Stars and cog wheels."""
    teeth = column(rng.integers(4, 11, count), x.device)
    wave = torch.sin(teeth * torch.atan2(y, x)) * column(rng.uniform(1, 5, count), x.device)
    return 0.68 + column(rng.uniform(0.08, 0.22, count), x.device) * torch.tanh(wave) - torch.hypot(x, y)


def draw_leaf(x: torch.Tensor, y: torch.Tensor, rng: np.random.Generator, count: int) -> torch.Tensor:
    """The lens between two circles."""
    shift = column(rng.uniform(0.3, 0.9, count), x.device)
    radius = torch.sqrt(shift**2 + 0.9**2)
    return torch.minimum(radius - torch.hypot(x - shift, y), radius - torch.hypot(x + shift, y))


def draw_crescent(x: torch.Tensor, y: torch.Tensor, rng: np.random.Generator, count: int) -> torch.Tensor:
    """A disc with a bite out of it."""
    shift = column(rng.uniform(0.3, 0.8, count), x.device)
    return torch.minimum(
        0.9 - torch.hypot(x, y), torch.hypot(x - shift, y) - column(rng.uniform(0.4, 0.7, count), x.device)
    )


def draw_letter(x: torch.Tensor, y: torch.Tensor, rng: np.random.Generator, count: int) -> torch.Tensor:
    """A stem, a bow and a bar, each there or not: letter-like glyphs."""
    width = column(rng.uniform(0.08, 0.16, count), x.device)
    stem = torch.minimum(width - (x + 0.5).abs(), 0.85 - y.abs())
    middle = column(rng.uniform(-0.4, 0.4, count), x.device)
    bow = width - (torch.hypot(x + 0.1, y - middle) - 0.42).abs()
    bar = torch.minimum(width - (y + middle).abs(), 0.6 - x.abs())
    bow = torch.where(column(rng.random(count) < 0.7, x.device) > 0, bow, torch.full_like(bow, -1.0))
    bar = torch.where(column(rng.random(count) < 0.7, x.device) > 0, bar, torch.full_like(bar, -1.0))
    return torch.maximum(stem, torch.maximum(bow, bar))


FAMILIES: dict[str, Callable[[torch.Tensor, torch.Tensor, np.random.Generator, int], torch.Tensor]] = {
    "blob": lambda x, y, rng, count: draw_radial(x, y, rng, count, 6),
    "polygon": draw_polygon,
    "superellipse": draw_superellipse,
    "ring": draw_ring,
    "stroke": draw_stroke,
    "pair": draw_pair,
    "gear": draw_gear,
    "leaf": draw_leaf,
    "crescent": draw_crescent,
    "letter": draw_letter,
}


def draw_silhouettes(
    families: tuple[str, ...], each: int, side_px: int, rng: np.random.Generator, device: torch.device
) -> torch.Tensor:
    """Draw `each` silhouettes of every family: [families * each, side, side] float32, local units."""
    x, y = make_grid(side_px, device)
    return torch.cat([FAMILIES[family](x, y, rng, each) for family in families])


def draw_horizons(count: int, side_px: int, rng: np.random.Generator, device: torch.device) -> torch.Tensor:
    """Wavy half-planes, inside below: ground, hills, water, table tops. [count, side, side] float32."""
    x, y = make_grid(side_px, device)
    field = y.expand(count, -1, -1).clone()
    rough = rng.choice([0.0, 0.03, 0.12], count)
    for k in range(1, 8):
        phase = column(rng.uniform(0, 2 * math.pi, count), device)
        field += column(rough * rng.normal(0, 1, count) / k**0.7, device) * torch.sin(2.2 * k * x + phase)
    return field
