"""Tile choices: one JSON per GPU name, prepared by `python -m bench.attention --tune`, never on a live request.

A key is "kernel d dtype", such as "global 64 bfloat16"; under it, the smallest batch each choice is for. A GPU without
a file, and a key that its file lacks, take `default.json`. Its 16-bit choices fit an sm_80 and an sm_90; float32
windows of d 80 need the 189 KiB of shared memory that only the latter has.
"""

import functools
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parent
Choices = dict[str, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut up: query rows a program, warps, pipeline stages, TMA loads, a cap on registers.

    With `overlap`, `relpos_hopper_64` computes what suits it with 128 query rows and an image row a stage,
    `relpos_hopper_80` with 64 and two image rows a stage, `relpos_window_hopper` with 64 and a window's keys or values
    a stage, each with 4 warps.
    """

    block_m: int
    num_warps: int
    num_stages: int
    tma: bool = False
    max_registers: int | None = None
    overlap: bool = False

    def launch_options(self) -> dict[str, int]:
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options | ({"maxnreg": self.max_registers} if self.max_registers else {})


def tile_key(kernel: str, head_dim: int, dtype: torch.dtype) -> str:
    return f"{kernel} {head_dim} {str(dtype).removeprefix('torch.')}"


def choose_tile(kernel: str, qkv: torch.Tensor) -> Tile:
    """The tile for a [B, tokens, 3, heads, d] tensor on its device."""
    gpu = torch.cuda.get_device_name(qkv.device) if qkv.is_cuda else ""
    return lookup_tile(gpu, tile_key(kernel, qkv.shape[-1], qkv.dtype), qkv.shape[0])


@functools.cache
def lookup_tile(gpu: str, key: str, batch: int) -> Tile:
    """The choice for the largest batch that is not above this one, of the GPU's file or else of the default."""
    by_batch = _read(tiles_path(gpu)).get(key) or _read(tiles_path("default"))[key]
    sizes = sorted(map(int, by_batch))
    chosen = max((size for size in sizes if size <= batch), default=sizes[0])
    return Tile(**by_batch[str(chosen)])


def tiles_path(gpu: str, folder: Path = _FOLDER) -> Path:
    return folder / f"{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-') or 'none'}.json"


def write_tiles(gpu: str, chosen: dict[str, dict[int, Tile]], folder: Path) -> Path:
    """Adds choices to a GPU's file in `folder`, starting from the installed one."""
    choices = _read(tiles_path(gpu))
    for key, by_batch in chosen.items():
        choices[key] = {str(batch): asdict(tile) for batch, tile in sorted(by_batch.items())}
    path = tiles_path(gpu, folder)
    path.write_text(json.dumps(dict(sorted(choices.items())), indent=2) + "\n")
    return path


def _read(path: Path) -> Choices:
    if not path.exists():
        return {}
    choices: Choices = json.loads(path.read_text())
    return choices
