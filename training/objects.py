"""Choose objects and parts of drawn scenes, as sets of codes, and turn them into masks."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from training.plan import LAYERS, REGION_LAYERS
from training.scenes import CODES, PARTS, Scenes

SMALLEST_OBJECT_SHARE = 1e-4
SMALLEST_PART_SHARE = 1.2e-3
PSEUDO_WEIGHT = 0.5
CUTOUT_PARTS = 5
SMALL_OBJECT_SHARE = 0.01
SMALL_OBJECT_FACTOR = 2.0
REPEAT_FACTOR = 0.15


@dataclass(frozen=True)
class Targets:
    """Masks to learn, M for each of B scenes.

    masks: [B, M, S, S] bool
    weight: [B, M] float32, 0 where a scene has no such object, less than 1 for regions found by colour alone
    """

    masks: torch.Tensor
    weight: torch.Tensor


def list_candidates(scenes: Scenes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every set of codes that may be asked for.

    Returns: members [B, K, 256] bool, how often to ask for each [B, K], its weight in the loss [B, K].
    """
    device, batch = scenes.codes.device, len(scenes.codes)
    layer_of = torch.arange(CODES, device=device) // PARTS
    part_of = torch.arange(CODES, device=device) % PARTS
    layers = torch.arange(LAYERS, device=device)
    own = layer_of == layers[:, None]
    patch = (layer_of == layers[:, None] + 1) & scenes.is_child.roll(-1, 1)[..., None]
    whole = own | patch
    often = torch.ones(batch, LAYERS, device=device)
    often[:, 1 : REGION_LAYERS + 1] = 0.4
    often[:, 0] = 0.3 * scenes.plain
    often = torch.where(scenes.is_child, 0.5, often)
    numbers = torch.arange(1, PARTS, device=device)
    background_parts = (layer_of == 0) & (part_of == numbers[:, None])
    first, last = REGION_LAYERS + 1, LAYERS
    cutout_parts = own[first:last, None] & (part_of == numbers[:CUTOUT_PARTS, None])
    parts = torch.cat([background_parts, cutout_parts.flatten(0, 1)])
    members = torch.cat([whole, parts.expand(batch, -1, -1)], 1)
    rates = torch.full((len(parts),), 0.03, device=device)
    rates[: PARTS - 1] = 0.1
    weight = torch.ones(members.shape[:2], device=device)
    weight[:, LAYERS:] = PSEUDO_WEIGHT
    return members, torch.cat([often, rates.expand(batch, -1)], 1), weight


def measure(scenes: Scenes, members: torch.Tensor) -> torch.Tensor:
    """Share of the frame that each candidate covers, from every second pixel: [B, K] float32."""
    codes = scenes.codes[:, ::2, ::2].flatten(1)
    counts = torch.zeros(len(codes), CODES, device=codes.device)
    counts.scatter_add_(1, codes, torch.ones_like(codes, dtype=torch.float32))
    return torch.einsum("bkc,bc->bk", members.float(), counts) / codes.shape[1]


@torch.no_grad()
def choose_targets(scenes: Scenes, count: int, generator: torch.Generator, parts: bool = True) -> Targets:
    """Choose `count` objects a scene.

    With `parts` as in training: small objects more often, and a whole object again rather than too many parts, for it
    may then meet the other kind of prompt. Without: whole objects only, none twice while there are enough.
    """
    members, often, weight = list_candidates(scenes)
    if not parts:
        members, often, weight = members[:, :LAYERS], often[:, :LAYERS], weight[:, :LAYERS]
    share = measure(scenes, members)
    repeat = torch.zeros(members.shape[1], device=share.device)
    if parts:
        often[:, :LAYERS] *= torch.where(share[:, :LAYERS] < SMALL_OBJECT_SHARE, SMALL_OBJECT_FACTOR, 1.0)
        repeat[:LAYERS] = REPEAT_FACTOR
    least = torch.full((members.shape[1],), SMALLEST_PART_SHARE, device=share.device)
    least[:LAYERS] = SMALLEST_OBJECT_SHARE
    eligible = (share >= least) & (often > 0) & (share < 0.9)
    noise = torch.rand(2, *often.shape, generator=generator, device=often.device).clamp(1e-9, 1 - 1e-9)
    keys = torch.log(often.clamp(min=1e-9)) - torch.log(-torch.log(noise))
    keys[1] += torch.where(repeat > 0, repeat.log(), -1e3)
    keys = torch.where(eligible, keys, -1e6)
    chosen = keys.permute(1, 0, 2).flatten(1).topk(count).indices % members.shape[1]
    valid = eligible.gather(1, chosen)
    table = members.gather(1, chosen[..., None].expand(-1, -1, CODES))
    codes = scenes.codes.flatten(1)[:, None].expand(-1, count, -1)
    masks = table.gather(2, codes).view(len(codes), count, *scenes.codes.shape[1:])
    return Targets(masks=masks, weight=weight.gather(1, chosen) * valid)


def shrink_masks(masks: torch.Tensor, side: int) -> torch.Tensor:
    """Coverage on the grid of the decoder's masks: [..., S, S] bool to [..., side, side] float32 in 0..1."""
    cell = masks.shape[-1] // side
    return F.avg_pool2d(masks.flatten(0, -3)[:, None].float(), cell).view(*masks.shape[:-2], side, side)
