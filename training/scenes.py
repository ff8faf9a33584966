"""Draw labelled scenes in batches on the device: layers painted from back to front over a photograph or a texture.

Each pixel gets a code, `layer * 16 + part`; an object is a set of codes (see `objects.py`). Layer 0 is the
background, layers 1 and 2 may be regions such as ground or sky, later ones are cut-outs, silhouettes with a texture,
or patches painted on the layer before them. Codes are modal: they name what can be seen.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from training.plan import LAYERS, REGION_LAYERS, Plan, plan_scenes
from training.pool import Materials

PARTS = 16
NOTHING = LAYERS * PARTS
CODES = 256
SHADOW_CELL_PX = 16


@dataclass(frozen=True)
class Scenes:
    """Drawn images and their labels.

    images: [B, 3, S, S] float32, RGB 0..255, zero outside the valid frame
    valid: [B, 1, S, S] bool, the frame: images need not be square, padding is right or below
    codes: [B, S, S] int64
    is_child: [B, LAYERS] bool, the layer is a patch on the one before it
    plain: [B] bool, the background is a thing of its own rather than a photograph of many
    """

    images: torch.Tensor
    valid: torch.Tensor
    codes: torch.Tensor
    is_child: torch.Tensor
    plain: torch.Tensor


def upload(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A host array as float32 on the device, without waiting for it."""
    return torch.from_numpy(values.astype(np.float32)).to(device, non_blocking=True)


def upload_index(rows: np.ndarray, device: torch.device) -> torch.Tensor:
    """Row numbers as int64 on the device, without waiting for it."""
    return torch.from_numpy(rows).to(device, non_blocking=True)


def make_frame(side_px: int, device: torch.device) -> torch.Tensor:
    """Pixel centres in frame units: [1, side, side, 2] float32, (x, y)."""
    line = (torch.arange(side_px, device=device) + 0.5) * (2 / side_px) - 1
    return torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)[None]


def draw_warp(batch: int, side_px: int, rng: np.random.Generator, device: torch.device) -> torch.Tensor:
    """A gentle displacement of the whole plane: [batch, side, side, 2] float32, frame units."""
    strength = rng.uniform(0, 0.05, (batch, 1, 1, 1))
    coarse = upload(rng.normal(0, 1, (batch, 2, 7, 7)) * strength, device)
    return F.interpolate(coarse, (side_px, side_px), mode="bicubic").permute(0, 2, 3, 1)


def send(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A host array of one number a scene as [B, 1, 1, 1] float32."""
    return upload(values, device).view(-1, 1, 1, 1)


def place(frame: torch.Tensor, centre: np.ndarray, size: np.ndarray, angle: np.ndarray) -> torch.Tensor:
    """Frame coordinates to a layer's local ones: [B, side, side, 2], the layer covering [-1, 1]."""
    cos, sin = np.cos(angle), np.sin(angle)
    rows = np.stack([np.stack([cos, sin], -1) / size[:, :1], np.stack([-sin, cos], -1) / size[:, 1:]], 1)
    matrix = upload(rows, frame.device)
    shift = upload(np.einsum("bij,bj->bi", rows, centre), frame.device)
    x, y = frame.unbind(-1)
    return torch.stack(
        [x * matrix[:, i, 0, None, None] + y * matrix[:, i, 1, None, None] - shift[:, i, None, None] for i in range(2)],
        -1,
    )


def pick(bank: torch.Tensor, index: np.ndarray) -> torch.Tensor:
    """Rows of a bank as float32."""
    return bank[upload_index(index, bank.device)].float()


@dataclass(frozen=True)
class Fill:
    """Which piece of a texture fills each scene's layer, and the gradient of light across it: [B, ...] arrays."""

    texture: np.ndarray
    size: np.ndarray
    centre: np.ndarray
    angle: np.ndarray
    slope: np.ndarray

    @classmethod
    def plan(cls, texture: np.ndarray, rng: np.random.Generator) -> "Fill":
        batch = len(texture)
        size = np.exp(rng.uniform(np.log(0.5), np.log(3.0), (batch, 1))) * np.ones(2)
        centre, angle = rng.uniform(-1, 1, (batch, 2)), rng.uniform(-np.pi, np.pi, batch)
        return cls(texture, size, centre, angle, (rng.normal(0, 0.35, (2, batch)) * rng.choice([0, 1], batch)).T)

    def paint(self, materials: Materials, frame: torch.Tensor) -> torch.Tensor:
        """[B, 3, side, side] float32, 0..255."""
        grid = place(frame, self.centre, self.size, self.angle)
        colours = F.grid_sample(
            pick(materials.fills, self.texture), grid, padding_mode="reflection", align_corners=False
        )
        x, y = frame[..., 0][:, None], frame[..., 1][:, None]
        light = 1 + send(self.slope[:, 0], frame.device) * x + send(self.slope[:, 1], frame.device) * y
        return colours * light.clamp(0.2, 2)


@dataclass(frozen=True)
class Jitter:
    """Gain, contrast and white balance, a little off in each scene: [B, ...] arrays."""

    contrast: np.ndarray
    gain: np.ndarray
    shift: np.ndarray

    @classmethod
    def plan(cls, batch: int, rng: np.random.Generator) -> "Jitter":
        contrast, gain = rng.uniform(0.7, 1.2, batch), np.exp(rng.normal(0, 0.06, (batch, 3)))
        return cls(contrast, gain, rng.normal(0, 16, batch))

    def apply(self, colours: torch.Tensor) -> torch.Tensor:
        """Change [B, 3, side, side] colours in 0..255."""
        slope = self.contrast[:, None] * self.gain
        offset = (128 + self.shift - 128 * self.contrast)[:, None] * self.gain
        slope_there, offset_there = (upload(values, colours.device)[..., None, None] for values in (slope, offset))
        return torch.addcmul(offset_there, colours, slope_there)


def take(values: Any, rows: np.ndarray) -> Any:
    """Some scenes of a plan whose arrays all begin with the scene."""
    return replace(values, **{field.name: getattr(values, field.name)[rows] for field in fields(values)})


def paint_background(
    materials: Materials, plan: Plan, frame: torch.Tensor, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest layer: images [B, 3, side, side] float32 and codes [B, side, side] int64."""
    batch, side = len(plan.plain), frame.shape[1]
    images = Fill.plan(plan.fill[0], rng).paint(materials, frame)
    images = Jitter.plan(batch, rng).apply(images)
    codes = torch.zeros(batch, side, side, dtype=torch.int64, device=frame.device)
    if len(materials.photographs):
        zoom = np.exp(rng.uniform(np.log(1.0), np.log(2.6), batch))
        aspect = materials.photograph_aspect[plan.photograph]
        size = np.stack([np.maximum(aspect, 1), np.maximum(1 / aspect, 1)], -1) * zoom[:, None]
        size[:, 0] *= rng.choice([-1, 1], batch)
        centre = (np.abs(size) - 1) * rng.uniform(-1, 1, (batch, 2))
        grid = place(frame, centre, size, rng.normal(0, 0.05, batch))
        source = pick(materials.photographs, plan.photograph)
        colours = F.grid_sample(source[:, :3], grid, padding_mode="reflection", align_corners=False)
        regions = F.grid_sample(source[:, 3:], grid, mode="nearest", padding_mode="reflection", align_corners=False)
        is_photograph = send(~plan.plain, frame.device) > 0
        images = torch.where(is_photograph, Jitter.plan(batch, rng).apply(colours), images)
        codes = torch.where(is_photograph[:, 0], regions[:, 0].long().clamp(0, PARTS - 1), codes)
    cell = side // 64
    blurred = F.avg_pool2d(F.avg_pool2d(images, cell), 3, 1, 1, count_include_pad=False)
    blurred = F.interpolate(blurred, (side, side), mode="bilinear")
    share = send(np.where(rng.random(batch) < 0.3, rng.uniform(0.4, 1, batch), 0), frame.device)
    return images.lerp(blurred, share), codes


def cast_shadow(images: torch.Tensor, alpha: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Darken what lies under and beside a layer, softly; some scenes only."""
    batch, side = len(images), images.shape[-1]
    cell = side // (1024 // SHADOW_CELL_PX)
    soft = F.avg_pool2d(F.avg_pool2d(alpha, cell), 5, 1, 2)
    dx, dy = rng.integers(-3, 4), rng.integers(-1, 4)
    soft = torch.roll(soft, (int(dy), int(dx)), (2, 3))
    strength = send(rng.uniform(0, 0.6, batch) * (rng.random(batch) < 0.5), images.device)
    return images * (1 - strength * F.interpolate(soft, (side, side), mode="bilinear"))


def draw_outlines(materials: Materials, plan: Plan, layer: int, scenes: np.ndarray, grid: torch.Tensor) -> torch.Tensor:
    """Opacity of the silhouettes of some scenes' layer: [n, 1, side, side] float32 in 0..1."""
    bank, index = (
        (materials.horizons, plan.horizon) if 1 <= layer <= REGION_LAYERS else (materials.silhouettes, plan.silhouette)
    )
    field = F.grid_sample(pick(bank, index[layer, scenes])[:, None], grid, padding_mode="border", align_corners=False)
    if layer > REGION_LAYERS:
        field = torch.minimum(field, 1 - grid.abs().amax(-1)[:, None])
    local_px = plan.size[layer, scenes].min(-1) * grid.shape[1] / 2
    return (0.5 + field * send(local_px / plan.softness[layer, scenes], grid.device)).clamp(0, 1)


def paint_layer(
    materials: Materials,
    plan: Plan,
    layer: int,
    scenes: np.ndarray,
    frame: torch.Tensor,
    warp: torch.Tensor,
    rng: np.random.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One layer of n scenes: colours [n, 3, s, s], opacity [n, 1, s, s] and part labels [n, s, s].

    All numbers are drawn for all scenes; only what shows is computed.
    """
    count, side, device = len(scenes), frame.shape[1], frame.device
    size = plan.size[layer, scenes].copy()
    size[:, 0] *= rng.choice([-1, 1], count)
    grid = place(frame + warp, plan.centre[layer, scenes], size, plan.angle[layer, scenes])
    fill, fill_jitter = Fill.plan(plan.fill[layer, scenes], rng), Jitter.plan(count, rng)
    colours = torch.empty(count, 3, side, side, device=device)
    alpha = torch.empty(count, 1, side, side, device=device)
    parts = torch.zeros(count, side, side, dtype=torch.int64, device=device)
    is_cutout = plan.is_cutout[layer, scenes]
    own = is_cutout & plan.own_colours[layer, scenes]
    if len(materials.cutouts) and layer > REGION_LAYERS:
        sharpness, cutout_jitter = rng.uniform(1.0, 3.5, count), Jitter.plan(count, rng)
        if is_cutout.any():
            rows, rows_there = np.flatnonzero(is_cutout), upload_index(np.flatnonzero(is_cutout), device)
            source = pick(materials.cutouts, plan.cutout[layer, scenes[rows]])
            sampled = F.grid_sample(source[:, :4], grid[rows_there], align_corners=False)
            alpha[rows_there] = ((sampled[:, 3:] / 255 - 0.5) * send(sharpness[rows], device) + 0.5).clamp(0, 1)
            colours[rows_there] = take(cutout_jitter, rows).apply(sampled[:, :3])
            labels = F.grid_sample(source[:, 4:], grid[rows_there], mode="nearest", align_corners=False)
            parts[rows_there] = torch.where(send(own[rows], device) > 0, labels, 0)[:, 0].long()
    if not is_cutout.all():
        rows = np.flatnonzero(~is_cutout)
        rows_there = upload_index(rows, device)
        alpha[rows_there] = draw_outlines(materials, plan, layer, scenes[rows], grid[rows_there])
    if not own.all():
        rows = np.flatnonzero(~own)
        colours[upload_index(rows, device)] = take(fill_jitter, rows).apply(take(fill, rows).paint(materials, frame))
    return colours, alpha, parts


def finish(images: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """The camera: exposure, vignette, blur and noise. [B, 3, S, S] float32 in 0..255."""
    batch, side, device = len(images), images.shape[-1], images.device
    images = images.clamp(0, 255) / 255
    images = images.clamp(min=1e-3) ** send(np.exp(rng.normal(0, 0.25, batch)), device)
    light = make_frame(side, device)
    slope = rng.normal(0, 0.2, (2, batch))
    images = images * (1 + send(slope[0], device) * light[..., 0] + send(slope[1], device) * light[..., 1])
    blurred = F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    images = images.lerp(blurred, send(rng.uniform(0, 1, batch) * (rng.random(batch) < 0.5), device))
    seed = torch.Generator(device).manual_seed(int(rng.integers(2**31)))
    noise = torch.empty_like(images).normal_(generator=seed)
    return ((images + noise * send(rng.uniform(0, 0.04, batch) ** 1.5, device)) * 255).clamp(0, 255)


def draw_frames(batch: int, side_px: int, rng: np.random.Generator, device: torch.device) -> torch.Tensor:
    """Which pixels are inside each image: half of them square, the others cut right or below. [B, 1, S, S] bool."""
    short = np.where(rng.random(batch) < 0.6, rng.uniform(0.5, 0.95, batch), 1)
    cut_right = rng.random(batch) < 0.3
    line = torch.arange(side_px, device=device)
    width = send(np.where(cut_right, short, 1) * side_px, device)
    height = send(np.where(cut_right, 1, short) * side_px, device)
    return (line.view(1, 1, 1, -1) < width) & (line.view(1, 1, -1, 1) < height)


@torch.no_grad()
def draw_scenes(materials: Materials, batch: int, side_px: int, rng: np.random.Generator) -> Scenes:
    """Draw a batch of scenes. The host's generator decides everything, so a seed names a batch."""
    device = materials.fills.device
    plan = plan_scenes(materials, batch, rng)
    frame = make_frame(side_px, device)
    images, codes = paint_background(materials, plan, frame, rng)
    warp = draw_warp(batch, side_px, rng, device)
    below = torch.zeros_like(images[:, :1])
    for layer in np.flatnonzero(plan.active.any(1)).tolist():
        if layer == 0:
            continue
        rows = np.flatnonzero(plan.active[layer])
        there = upload_index(rows, device)
        colours, alpha, parts = paint_layer(materials, plan, layer, rows, frame, warp[there], rng)
        on_parent = send(plan.is_child[layer, rows], device) > 0
        alpha = torch.where(on_parent, alpha * below[there], alpha)
        under = images[there]
        under = torch.where(on_parent, under, cast_shadow(under, alpha, rng))
        images[there] = under.lerp(colours, alpha)
        codes[there] = torch.where(alpha[:, 0] > 0.5, layer * PARTS + parts.clamp(0, PARTS - 1), codes[there])
        below[there] = alpha
    valid = draw_frames(batch, side_px, rng, device)
    return Scenes(
        images=finish(images, rng) * valid,
        valid=valid,
        codes=torch.where(valid[:, 0], codes, NOTHING),
        is_child=torch.from_numpy(plan.is_child.T.copy()).to(device, non_blocking=True),
        plain=torch.from_numpy(plan.plain).to(device, non_blocking=True),
    )
