"""Checkpoints made by `splitsam optimize`: what a precision does to the image encoder's weights is done in them.

They are safetensors files under `segment_anything`'s names. A weight that is multiplied in int8 is three tensors:

    name            [N, K] int8
    name.scale      [N], of the rows
    name.largest    [N], the largest magnitude of each row before it was rounded

and reads as name * scale, but the numbers at the end of int8's range read as +-largest: 127 * scale falls short of it.
So whoever rounds what was read finds the same scales, and with them the same int8 numbers, bit by bit.
Everything else is float32, kept in 16 bits where that loses nothing.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from splitsam.common.errors import CheckpointError

OPTIMISED_PRECISIONS = ("bf16", "int8", "int8_sparse", "seed")
FORMAT_VERSION = "1"
_METADATA_KEY = "splitsam_optimised"
_SHA256 = "[0-9a-f]{64}"
_METADATA = {
    "model": "vit_[a-z]",
    "model_id": _SHA256,
    "source_sha256": _SHA256,
    "precision": "|".join(OPTIMISED_PRECISIONS),
    "rungs": "[a-z0-9_]+( [a-z0-9_]+)*",
    "images": "[0-9]{1,9}",
}


@dataclass(frozen=True)
class Optimisation:
    """What a file was made of, and for what; its metadata.

    Args:
        model: the architecture.
        model_id: of the source's weights, which the file goes on to be known by.
        source_sha256: digest of the source's file.
        precision: one of OPTIMISED_PRECISIONS.
        rungs: of the ladder, those that the weights have behind them.
        images: how many it was pruned on; none means by magnitude, where it was pruned.
    """

    model: str
    model_id: str
    source_sha256: str
    precision: str
    rungs: tuple[str, ...]
    images: int = 0


def parse_metadata(metadata: Mapping[str, str]) -> Optimisation | None:
    """What a safetensors file says of itself; None when it is not an optimised one.

    Raises:
        CheckpointError: it is one, of another format or with other metadata than `write_optimised` writes.
    """
    if _METADATA_KEY not in metadata:
        return None
    again = "make it again from its source with `splitsam optimize`"
    try:
        fields = {key: str(value) for key, value in json.loads(metadata[_METADATA_KEY]).items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"an optimised file with damaged metadata: {again}") from error
    version = fields.get("version", "")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"an optimised file of format {version[:20]!r}, and this release reads {FORMAT_VERSION!r}: {again}"
        )
    for key, pattern in _METADATA.items():
        value = fields.get(key, "")
        if not re.fullmatch(pattern, value):
            raise CheckpointError(f"an optimised file with damaged metadata, {key} is {value[:80]!r}: {again}")
    return Optimisation(
        model=fields["model"],
        model_id=fields["model_id"],
        source_sha256=fields["source_sha256"],
        precision=fields["precision"],
        rungs=tuple(fields["rungs"].split()),
        images=int(fields["images"]),
    )


def write_optimised(path: Path, tensors: Mapping[str, Tensor], optimisation: Optimisation) -> None:
    """Write a file that `load_model` reads.

    Args:
        path: a file that may be written over.
        tensors: all of SAM's, those in int8 by `pack_rows`.

    Raises:
        CheckpointError: it cannot be written.
    """
    fields = dataclasses.asdict(optimisation) | {"rungs": " ".join(optimisation.rungs), "version": FORMAT_VERSION}
    # One entry: safetensors writes several in an order of chance, and with it the file's digest would change.
    metadata = {_METADATA_KEY: json.dumps(fields, sort_keys=True)}
    stored = {name: _shorten(tensor).contiguous() for name, tensor in tensors.items()}
    try:
        save_file(stored, path, metadata)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error


def pack_rows(name: str, rows: Tensor, scale: Tensor, largest: Tensor) -> dict[str, Tensor]:
    """The tensors of one weight in int8: rows [N, K] int8, scale [N, 1], largest [N]."""
    return {name: rows, f"{name}.scale": scale.flatten().float(), f"{name}.largest": largest.float()}


def restore_weights(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The floating-point weights of an optimised file's tensors.

    Raises:
        CheckpointError: int8 numbers without their scales.
    """
    weights = dict(stored)
    for name in [name for name, tensor in stored.items() if tensor.dtype == torch.int8]:
        rows, scale, largest = (weights.pop(key, None) for key in (name, f"{name}.scale", f"{name}.largest"))
        if rows is None or scale is None or largest is None:
            raise CheckpointError(f"{name} is in int8, and {name}.scale or {name}.largest is missing")
        if rows.ndim != 2 or not scale.shape == largest.shape == rows.shape[:1]:
            raise CheckpointError(f"{name} is in int8, and {name}.scale or {name}.largest is not one number a row")
        weights[name] = _unpack_rows(rows, scale.float(), largest.float())
    return weights


def _unpack_rows(rows: Tensor, scale: Tensor, largest: Tensor) -> Tensor:
    """[N, K] float32."""
    lowest, highest = rows == -128, rows == 127
    # -largest may have been rounded to -128 or -127, so it stands for the former where there is one, +largest for 127.
    ends = torch.where(highest.any(1, keepdim=True), highest, rows == -127)
    ends = torch.where(lowest.any(1, keepdim=True), lowest, ends)
    return torch.where(ends, rows.sign() * largest[:, None], rows * scale[:, None])


def _shorten(tensor: Tensor) -> Tensor:
    """The same numbers in 16 bits if they are float32 and fit."""
    if tensor.dtype == torch.float32:
        for dtype in (torch.bfloat16, torch.float16):
            if torch.equal(tensor.to(dtype).float(), tensor):
                return tensor.to(dtype)
    return tensor
