"""Loading weights: which model they are, whether they are whole, and the id that names them everywhere."""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open

from splitsam.common.architectures import ARCHITECTURES, Architecture, build_sam
from splitsam.common.checkpoint_files import META_SHA256, META_URL, locate_checkpoint
from splitsam.common.errors import CheckpointError
from splitsam.common.optimised_files import Optimisation, parse_metadata, restore_weights
from splitsam.common.sam_modules import Sam

DEMONSTRATION_MODEL = "vit_t"
_GLOBAL_REL_POS_ROWS = 2 * 64 - 1
_WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be moved to its device.

    Args:
        sam: fp32, in eval mode, on the CPU, without gradients.
        model_id: see `compute_model_id`; an optimised file has that of its source.
        demonstration: the small model; say so wherever it is shown.
        notes: what an operator should know of the weights, one sentence each.
        path: the file that was read.
        optimisation: what was done to the image encoder's weights, if the file is an optimised one.
    """

    sam: Sam
    name: str
    model_id: str
    demonstration: bool
    notes: tuple[str, ...]
    path: Path
    optimisation: Optimisation | None = None


def load_model(*, model: str | None, checkpoint: str | None, sha256: str | None, cache_dir: Path) -> LoadedModel:
    """Load the weights that the settings of these names ask for.

    Args:
        model: an architecture's name; None reads it from the checkpoint.
        checkpoint: a path, a file:// or an https:// URL; None is the vit_t that travels with the package.
        sha256: the digest that the checkpoint's file must have.
        cache_dir: where downloads are kept.

    Raises:
        CheckpointError: anything that keeps the weights from being used; one line that says what to do.
    """
    if model is not None and model not in ARCHITECTURES:
        raise CheckpointError(f"no model is called {model!r}: there are {', '.join(ARCHITECTURES)}")
    if checkpoint is None:
        if model not in (None, DEMONSTRATION_MODEL):
            raise CheckpointError(_how_to_get(model))
        if sha256 is not None:
            raise CheckpointError("--sha256 is the digest of --checkpoint, which is not given")
        return _load_shipped()
    path = locate_checkpoint(checkpoint, sha256, cache_dir)
    return _load_file(path, path.name if "://" not in checkpoint else checkpoint.partition("?")[0], model)


def compute_model_id(weights: Mapping[str, torch.Tensor]) -> str:
    """Name weights by their content: SHA-256 over the sorted (name, shape, fp32 bytes), 64 hex digits.

    Names, shapes and bytes are preceded by their lengths (64-bit little-endian), the numbers are little-endian
    too, so that every file format of the same weights gives the same id.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().to("cpu", torch.float32).contiguous()
        encoded = name.encode()
        lengths = (len(encoded), tensor.ndim, *tensor.shape, tensor.nbytes)
        digest.update(b"".join(length.to_bytes(8, "little") for length in lengths))
        digest.update(encoded)
        digest.update(tensor.reshape(-1).numpy().astype("<f4", copy=False).data)
    return digest.hexdigest()


def recognise_architecture(weights: Mapping[str, torch.Tensor]) -> Architecture:
    """Tell the architecture from the shapes of the weights.

    Raises:
        CheckpointError: these are not SAM's weights under `segment_anything`'s names, or of no known size.
    """
    patch = weights.get("image_encoder.patch_embed.proj.weight")
    if patch is None or patch.ndim != 4:
        raise CheckpointError("no weights of segment_anything's SAM: image_encoder.patch_embed.proj.weight is missing")
    prefix, suffix = "image_encoder.blocks.", ".attn.rel_pos_h"
    blocks = {
        int(index): weights[name].shape[0] if weights[name].ndim else 0
        for name in weights
        if name.startswith(prefix) and name.endswith(suffix)
        if (index := name.removeprefix(prefix).removesuffix(suffix)).isdecimal()
    }
    found = (patch.shape[0], len(blocks), tuple(sorted(i for i in blocks if blocks[i] == _GLOBAL_REL_POS_ROWS)))
    for spec in ARCHITECTURES.values():
        if found == (spec.width, spec.depth, spec.global_blocks):
            return spec
    raise CheckpointError(
        f"an image encoder {found[0]} wide and {found[1]} deep with global attention in blocks {list(found[2])} "
        f"is none of {', '.join(ARCHITECTURES)}"
    )


def _how_to_get(model: str | None) -> str:
    name = next(name for name in META_SHA256 if name.startswith(f"sam_{model}_"))
    return (
        f"{model} needs its weights, for both services: "
        f"`splitsam serve-encoder --checkpoint {META_URL}{name}` and `splitsam serve-decoder` likewise, or set "
        "SPLITSAM_ENCODER_CHECKPOINT and SPLITSAM_DECODER_CHECKPOINT to that URL"
    )


def _load_shipped() -> LoadedModel:
    asset = resources.files("splitsam.common.assets") / f"{DEMONSTRATION_MODEL}.safetensors"
    with resources.as_file(asset) as path:
        if not path.is_file():
            raise CheckpointError(
                "the weights of the shipped vit_t are missing from this installation: "
                "install splitsam again, or give --checkpoint"
            )
        # It ships in half precision: no news to anybody.
        return dataclasses.replace(_load_file(path, path.name, DEMONSTRATION_MODEL), notes=())


def _load_file(path: Path, shown: str, model: str | None) -> LoadedModel:
    try:
        weights, metadata = _read_weights(path)
        optimisation = parse_metadata(metadata)
        if optimisation is not None:
            weights = restore_weights(weights)
        spec = recognise_architecture(weights)
        for name in (model, optimisation and optimisation.model):
            if name is not None and spec.name != name:
                raise CheckpointError(f"the checkpoint holds {spec.name} weights, not {name}")
        sam = build_sam(spec)
        _check_weights(weights, sam.state_dict())
    except CheckpointError as error:
        raise CheckpointError(f"{shown}: {error}") from error
    sam.load_state_dict(weights)
    sam.requires_grad_(False)
    return LoadedModel(
        sam=sam,
        name=spec.name,
        model_id=optimisation.model_id if optimisation else compute_model_id(sam.state_dict()),
        demonstration=spec.name == DEMONSTRATION_MODEL,
        notes=_notes(weights, optimisation),
        path=path,
        optimisation=optimisation,
    )


def _notes(weights: Mapping[str, torch.Tensor], optimisation: Optimisation | None) -> tuple[str, ...]:
    if optimisation is not None:
        count = optimisation.images
        pruned = f", pruned on {count} image{'s' if count > 1 else ''}" if count else ""
        return (f"The checkpoint's image encoder was made ready for {optimisation.precision} ahead of time{pruned}.",)
    kept = sorted({str(t.dtype).removeprefix("torch.") for t in weights.values() if t.dtype != torch.float32})
    return (f"The checkpoint's {' and '.join(kept)} weights were converted to float32.",) if kept else ()


def _read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a state dict, and a safetensors file's metadata; nothing but tensors is ever unpickled."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError("not a readable safetensors file: it is cut short or damaged") from error
    try:
        # Only the zip format, torch's own since 1.6, can be mapped instead of read.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except MemoryError:
        raise
    except Exception as error:
        message = "not a readable PyTorch checkpoint: it is cut short, damaged, or holds more than tensors"
        raise CheckpointError(message) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()
    ):
        raise CheckpointError("not a plain state dict, which maps names to tensors")
    return state, {}


def _check_weights(weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Compare names, shapes, types and values with what the architecture takes; the complaint is one line."""
    complaints = [
        f"{len(names)} {what}, first {names[0]}"
        for what, names in (
            ("missing", sorted(expected.keys() - weights.keys())),
            ("unexpected", sorted(weights.keys() - expected.keys())),
        )
        if names
    ]
    if complaints:
        raise CheckpointError(f"the names of the weights do not fit: {'; '.join(complaints)}")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(f"{name} is {list(tensor.shape)}, not {list(expected[name].shape)}")
        if tensor.dtype not in _WEIGHT_DTYPES or tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(f"{name} holds {tensor.dtype} ({tensor.layout}), not plain floating-point numbers")
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{name} holds numbers that are not finite")
