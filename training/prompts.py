"""Draw the prompts a user might give: a click, a loose box, then clicks where the last mask was wrong."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from training.batched import FRAME_PX

BOX_NOISE_SHARE = 0.1
BOX_NOISE_LIMIT_PX = 20.0


@dataclass(frozen=True)
class Prompts:
    """Tokens of N prompts of one kind.

    points: [N, P, 2] float32, frame pixels (x, y), the frame being 1024 px whatever the image's resolution
    labels: [N, P] int64, as in `batched.embed_points`; boxes end with 2, 3, clicks alone end with -1
    """

    points: torch.Tensor
    labels: torch.Tensor


def pick_cells(weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pick one cell for each map with probability proportional to its weight: [N, G, G] to [N] flat indices."""
    noise = torch.rand(weights.shape, generator=generator, device=weights.device).clamp(1e-9, 1 - 1e-7)
    keys = weights.clamp(min=1e-12).log() - (-noise.log()).log()
    return keys.flatten(1).argmax(1)


def cell_to_point(cells: torch.Tensor, side: int, generator: torch.Generator) -> torch.Tensor:
    """Flat indices of a [side, side] grid to points inside those cells: [N, 2] frame pixels."""
    jitter = torch.rand(len(cells), 2, generator=generator, device=cells.device) * 0.6 + 0.2
    return (torch.stack([cells % side, cells // side], 1) + jitter) * (FRAME_PX / side)


def favour_centre(coverage: torch.Tensor, power: torch.Tensor) -> torch.Tensor:
    """Weight the cells of [N, G, G] areas by how deep inside they lie, more so for a larger `power` [N]."""
    full = (coverage > 0.5).float()
    full = torch.where(full.flatten(1).amax(1).view(-1, 1, 1) > 0, full, coverage)
    depth = full[:, None]
    for cell in (5, 9, 17):
        depth = depth * (0.2 + F.avg_pool2d(full[:, None], cell, 1, cell // 2))
    depth = depth[:, 0] / depth.flatten(1).amax(1).clamp(min=1e-6).view(-1, 1, 1)
    return full * depth ** power.view(-1, 1, 1)


def draw_clicks(coverage: torch.Tensor, generator: torch.Generator) -> Prompts:
    """One click inside each object, half of them near its middle. coverage: [N, G, G] float32 in 0..1."""
    count, side = len(coverage), coverage.shape[-1]
    central = torch.rand(count, generator=generator, device=coverage.device) < 0.6
    cells = pick_cells(favour_centre(coverage, torch.where(central, 4.0, 0.0)), generator)
    points = cell_to_point(cells, side, generator)
    return Prompts(
        torch.stack([points, torch.zeros_like(points)], 1),
        torch.tensor([1, -1], device=coverage.device).expand(count, -1),
    )


def draw_boxes(masks: torch.Tensor, generator: torch.Generator) -> Prompts:
    """A box around each object, its corners off by up to a tenth of its sides, at most 20 px. masks: [N, S, S] bool."""
    count, side = len(masks), masks.shape[-1]
    line = torch.arange(side, device=masks.device)
    edges = []
    for hit in (masks.any(1), masks.any(2)):
        edges.append((torch.where(hit, line, side).amin(1), torch.where(hit, line + 1, 0).amax(1)))
    (left, right), (top, bottom) = edges
    corners = torch.stack([left, top, right, bottom], 1).float().clamp(0, side) * (FRAME_PX / side)
    extent = (corners[:, 2:] - corners[:, :2]).clamp(min=1).repeat(1, 2)
    noise = torch.randn(count, 4, generator=generator, device=masks.device) * BOX_NOISE_SHARE * extent
    scale = torch.rand(count, 1, generator=generator, device=masks.device)
    corners = corners + (noise * scale).clamp(-BOX_NOISE_LIMIT_PX, BOX_NOISE_LIMIT_PX)
    points = corners.clamp(0, FRAME_PX).view(count, 2, 2)
    return Prompts(points, torch.tensor([2, 3], device=masks.device).expand(count, -1))


def correct(prompts: Prompts, logits: torch.Tensor, coverage: torch.Tensor, generator: torch.Generator) -> Prompts:
    """Add one click where the mask is wrong, or inside the object where nothing is.

    Args:
        prompts: N prompts.
        logits: [N, G, G] of the last mask.
        coverage: [N, G, G] float32, the object.
    """
    wanted = coverage > 0.5
    wrong = (logits > 0) != wanted
    area = torch.where(wrong.flatten(1).any(1).view(-1, 1, 1), wrong, wanted).float()
    central = torch.rand(len(area), generator=generator, device=area.device) < 0.7
    cells = pick_cells(favour_centre(area, torch.where(central, 3.0, 0.0)), generator)
    label = wanted.flatten(1).gather(1, cells[:, None]).long()
    point = cell_to_point(cells, area.shape[-1], generator)[:, None]
    return insert(prompts, point, label)


def insert(prompts: Prompts, points: torch.Tensor, labels: torch.Tensor) -> Prompts:
    """Put clicks in the order of SAM's prompt encoder: before a box, before the padding."""
    is_box = prompts.labels[:, -1:] == 3
    keep = torch.where(is_box, prompts.labels.shape[1] - 2, prompts.labels.shape[1] - 1)
    place = torch.arange(prompts.labels.shape[1] + 1, device=labels.device)
    source = (place - (place > keep).long()).clamp(max=prompts.labels.shape[1] - 1)
    new = place == keep
    return Prompts(
        torch.where(new[..., None], points, prompts.points.gather(1, source[..., None].expand(-1, -1, 2))),
        torch.where(new, labels, prompts.labels.gather(1, source)),
    )


def join(first: Prompts, second: Prompts) -> Prompts:
    """Prompts of both, one after the other; both must have the same number of tokens."""
    return Prompts(torch.cat([first.points, second.points]), torch.cat([first.labels, second.labels]))
