"""Keep a training state as files of at most 16 MiB: float32 weights and half-precision averages, in shards."""

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

SHARD_BYTES = 15 * 2**20


def save_shards(tensors: dict[str, torch.Tensor], folder: Path, name: str, metadata: dict[str, str]) -> list[Path]:
    """Write tensors as `name.0.safetensors`, `name.1...`, each file replaced at once, never half written."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        tensor_bytes = tensor.numel() * tensor.element_size()
        if size + tensor_bytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][key] = tensor.detach().cpu().contiguous()
        size += tensor_bytes
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, shard in enumerate(shards):
        path = folder / f"{name}.{number}.safetensors"
        draft = path.with_suffix(".draft")
        save_file(shard, draft, {**metadata, "shards": str(len(shards))})
        os.replace(draft, path)
        paths.append(path)
    return paths


def load_shards(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read what `save_shards` wrote.

    Raises: FileNotFoundError where a shard is missing; ValueError where shards are of different moments.
    """
    tensors: dict[str, torch.Tensor] = {}
    first: dict[str, str] = {}
    number, count = 0, 1
    while number < count:
        with safe_open(folder / f"{name}.{number}.safetensors", "pt") as file:
            metadata = file.metadata()
            first = first or metadata
            if metadata != first:
                raise ValueError(f"{name}: shard {number} belongs to another moment than shard 0")
            count = int(metadata["shards"])
            for key in file.keys():  # noqa: SIM118 - not a dict
                tensors[key] = file.get_tensor(key)
        number += 1
    return tensors, first


def save_progress(
    folder: Path, weights: dict[str, torch.Tensor], average: dict[str, torch.Tensor], progress: dict[str, float]
) -> None:
    """Write weights (float32), their moving average (float16) and how far the training is."""
    metadata = {"progress": json.dumps(progress)}
    save_shards(weights, folder, "weights", metadata)
    save_shards({key: value.half() for key, value in average.items()}, folder, "average", metadata)


def load_progress(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, float]]:
    """Read what `save_progress` wrote: weights, average (both float32) and progress.

    The average alone will do, being a third of the size: training then goes on from it.
    """
    half, metadata = load_shards(folder, "average")
    average = {key: value.float() for key, value in half.items()}
    alone = not (folder / "weights.0.safetensors").exists()
    weights = {key: value.clone() for key, value in average.items()} if alone else load_shards(folder, "weights")[0]
    return weights, average, json.loads(metadata["progress"])
