"""Decide on the host what drawn scenes contain; `scenes.py` paints it."""

from dataclasses import dataclass

import numpy as np

from training.pool import Materials

LAYERS = 13
REGION_LAYERS = 2


@dataclass(frozen=True)
class Plan:
    """What to paint, decided on the host: [layer, scene] arrays, layer 0 being the background.

    active, is_cutout, own_colours, is_child: bool
    cutout, silhouette, horizon, fill: int64, indices into the materials
    centre, size: [layer, scene, 2] in frame units, the frame being [-1, 1]; size is half the extent
    angle: radians
    softness: width of the outline, pixels
    photograph: [scene] int64, the background; plain: [scene] bool, a texture takes its place
    """

    active: np.ndarray
    is_cutout: np.ndarray
    own_colours: np.ndarray
    is_child: np.ndarray
    cutout: np.ndarray
    silhouette: np.ndarray
    horizon: np.ndarray
    fill: np.ndarray
    centre: np.ndarray
    size: np.ndarray
    angle: np.ndarray
    softness: np.ndarray
    photograph: np.ndarray
    plain: np.ndarray


def plan_sizes(rng: np.random.Generator, batch: int) -> np.ndarray:
    """Half extents, the larger ones mostly at the back: [LAYERS, batch] float64."""
    typical = np.exp(rng.uniform(np.log(0.12), np.log(0.75), batch))
    sizes = np.clip(typical * np.exp(rng.normal(0, 0.6, (LAYERS, batch))), 0.02, 1.1)
    order = np.argsort(-np.log(sizes) + rng.normal(0, 0.4, sizes.shape), 0)
    return np.take_along_axis(sizes, order, 0)


def plan_scenes(materials: Materials, batch: int, rng: np.random.Generator) -> Plan:
    """Decide on the contents of a batch of scenes."""
    shape = (LAYERS, batch)
    layer = np.arange(LAYERS)[:, None]
    is_region = (layer >= 1) & (layer <= REGION_LAYERS)
    has_cutouts = len(materials.cutouts) > 0
    active = np.where(is_region, rng.random(shape) < 0.28, rng.random(shape) < rng.uniform(0.08, 0.95, batch))
    active[REGION_LAYERS + 1] = True
    is_cutout = (rng.random(shape) < 0.8) & has_cutouts & ~is_region
    size = plan_sizes(rng, batch)
    cutout = (
        rng.choice(len(materials.cutouts), shape, p=materials.cutout_odds) if has_cutouts else np.zeros(shape, np.int64)
    )
    centre = rng.uniform(-0.95, 0.95, (*shape, 2))
    angle = np.where(rng.random(shape) < 0.75, rng.normal(0, 0.25, shape), rng.uniform(-np.pi, np.pi, shape))
    is_child = (rng.random(shape) < 0.22) & (layer > REGION_LAYERS + 1)
    twin = (rng.random(shape) < 0.2) & (layer > REGION_LAYERS + 1) & ~is_child
    for i in range(REGION_LAYERS + 2, LAYERS):
        is_child[i] &= ~is_child[i - 1] & active[i - 1] & active[i]
        cutout[i] = np.where(twin[i], cutout[i - 1], cutout[i])
        size[i] = np.where(twin[i], size[i - 1] * rng.uniform(0.8, 1.2, batch), size[i])
        size[i] = np.where(is_child[i], size[i - 1] * rng.uniform(0.2, 0.7, batch), size[i])
        beside = centre[i - 1] + size[i - 1][:, None] * rng.uniform(-1.8, 1.8, (batch, 2))
        on_top = centre[i - 1] + size[i - 1][:, None] * rng.uniform(-0.7, 0.7, (batch, 2))
        centre[i] = np.where(twin[i][:, None], beside, np.where(is_child[i][:, None], on_top, centre[i]))
    stretch = np.exp(rng.normal(0, 0.25, shape))
    size_xy = np.stack([size * stretch, size / stretch], -1)
    region_size = rng.uniform(1.2, 2.5, (*shape, 1)) * np.ones(2)
    return Plan(
        active=active,
        is_cutout=is_cutout & ~(is_child & (rng.random(shape) < 0.7)),
        own_colours=rng.random(shape) < 0.88,
        is_child=is_child,
        cutout=cutout,
        silhouette=rng.integers(0, len(materials.silhouettes), shape),
        horizon=rng.integers(0, len(materials.horizons), shape),
        fill=rng.integers(0, len(materials.fills), shape),
        centre=np.where(is_region[..., None], rng.uniform(-0.7, 0.7, (*shape, 2)), centre),
        size=np.where(is_region[..., None], region_size, size_xy),
        angle=angle,
        softness=rng.uniform(0.8, 3.5, shape),
        photograph=rng.integers(0, max(1, len(materials.photographs)), batch),
        plain=(rng.random(batch) < 0.3) | (len(materials.photographs) == 0),
    )
