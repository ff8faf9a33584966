"""`splitsam optimize`: what a precision does to the image encoder's weights, done once and kept in a file.

    load -> [pruned on images] -> bf16 -> int8 -> 2:4, as far as the precision goes -> a safetensors file

`common/optimised_files.py` describes the file.

The service reads the file as any checkpoint and applies all rungs of its precision. Those it finds done change nothing
any more, so it computes the very numbers that it would with the source, on the device the file is made for: rungs of a
GPU round weights to bf16 before int8, those of a CPU do not.
"""

import logging
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from splitsam.common.checkpoint_files import file_sha256
from splitsam.common.checkpoints import LoadedModel, load_model
from splitsam.common.errors import CheckpointError, InvalidArgument
from splitsam.common.optimised_files import OPTIMISED_PRECISIONS, Optimisation, pack_rows, write_optimised
from splitsam.common.sam_modules import Sam
from splitsam.common.settings import DEFAULT_CACHE_DIR, SettingsProblem
from splitsam.encoder_service.calibrated_pruning import PRUNED_LAYERS, prune_on_images_
from splitsam.encoder_service.optimize import SPARSE_MLP, build_rungs
from splitsam.encoder_service.precision import PrecisionChoice, rungs_of
from splitsam.encoder_service.preprocess import ImageLimits, prepare_image
from splitsam.encoder_service.sparsity import find_linears

_ON_WEIGHTS = ("bf16", "int8", "sparse", SPARSE_MLP)
# What there is no file for, and why.
_MADE_AT_START = {
    "fp32": "leaves weights as they are",
    "fp8": "rounds weights when a service loads them, in seconds",
    "auto": "is chosen by each service when it starts",
}
_CPU = torch.device("cpu")
_DEVICES = ("cpu", "cuda")
_MIB = 2**20


def run_optimize(
    *,
    model: str | None,
    checkpoint: str | None,
    sha256: str | None,
    cache_dir: Path | None,
    precision: str,
    device: str,
    out: Path,
    images: Sequence[Path] = (),
) -> None:
    """Write an optimised file and say how to serve it.

    Args:
        model: as checkpoint, sha256 and cache_dir, of `load_model`.
        precision: one of OPTIMISED_PRECISIONS.
        device: that will serve the file: cpu, cuda, or auto, which is cuda where this machine has it.
        out: the file; one that exists is replaced when the new one is whole.
        images: files of the kind that will be served, to prune on, see `calibrated_pruning`; none prunes by magnitude.

    Raises:
        CheckpointError: one line that says what to do.
        OSError: there can be no file of that name.
    """
    rungs = choose_rungs(precision, device)
    if out.suffix != ".safetensors" or out.is_dir():
        raise CheckpointError(f"--out takes a file's name that ends in .safetensors, not {out}")
    if images and not any(rung in PRUNED_LAYERS for rung in rungs):
        raise CheckpointError(f"--image is for the precisions that prune, int8_sparse and seed, not for {precision}")
    with draft_of(out) as draft:
        loaded = load_model(model=model, checkpoint=checkpoint, sha256=sha256, cache_dir=cache_dir or DEFAULT_CACHE_DIR)
        _check_source(loaded, out)
        source_sha256, source_bytes = file_sha256(loaded.path), loaded.path.stat().st_size
        frames = read_images(images, loaded.sam)
        with quiet():
            tensors = optimise_weights(loaded.sam, rungs, frames)
        done = Optimisation(loaded.name, loaded.model_id, source_sha256, precision, rungs, len(images))
        write_optimised(draft, tensors, done)
    digest = file_sha256(out)
    only_for = _only_for(precision, rungs)
    on_cpu = ["--device", "cpu"] if only_for == "cpu" else []
    command = ["splitsam", "up", "--checkpoint", out, "--sha256", digest, "--precision", precision, *on_cpu]
    print(f"wrote     {out}: {loaded.name} for {precision}{f' on {only_for}' if only_for else ''}")
    print(f"size      {source_bytes / _MIB:.1f} MiB before, {out.stat().st_size / _MIB:.1f} MiB now")
    print(f"sha256    {digest}")
    print(f"model id  {loaded.model_id}, the source's")
    print(f"serve it  {shlex.join(map(str, command))}")


def choose_rungs(precision: str, device: str) -> tuple[str, ...]:
    """The rungs of a precision that change weights.

    Raises:
        CheckpointError: nothing can be done ahead of time for this precision, or on this kind of device.
    """
    able = ", ".join(OPTIMISED_PRECISIONS)
    if precision in _MADE_AT_START:
        raise CheckpointError(f"--precision {precision} {_MADE_AT_START[precision]}: ahead of time take one of {able}")
    if precision not in OPTIMISED_PRECISIONS:
        raise CheckpointError(f"--precision takes one of {able}, not {precision!r}")
    if device == "auto":
        device = "cpu" if precision in rungs_of("cpu") and not torch.cuda.is_available() else "cuda"
    if device not in _DEVICES:
        raise CheckpointError(f"--device takes auto, {' or '.join(_DEVICES)}, not {device!r}")
    there = [name for name in OPTIMISED_PRECISIONS if name in rungs_of(device)]
    if precision not in there:
        raise CheckpointError(f"--precision {precision} is not for a {device}: it can do {', '.join(there)}")
    return _on_weights(rungs_of(device)[precision])


def _on_weights(rungs: Sequence[str]) -> tuple[str, ...]:
    return tuple(rung for rung in _ON_WEIGHTS if rung in rungs)


def read_images(paths: Sequence[Path], sam: Sam) -> Tensor | None:
    """Image files as the encoder takes them: [n, 3, 1024, 1024] float32; None without any.

    Raises:
        CheckpointError: one of them is no image, in one line that names it.
    """
    frames = []
    for path in paths:
        try:
            prepared = prepare_image(path.read_bytes(), ImageLimits())
        except OSError as error:
            raise CheckpointError(f"--image {path}: {error.strerror or error}") from error
        except InvalidArgument as error:
            raise CheckpointError(f"--image {path}: {error}") from error
        frames.append(sam.preprocess(torch.from_numpy(prepared.pixels).permute(2, 0, 1)))
    return torch.stack(frames) if frames else None


def optimise_weights(sam: Sam, rungs: tuple[str, ...], images: Tensor | None) -> dict[str, Tensor]:
    """Apply rungs to the image encoder, in place, and give all weights as `write_optimised` takes them.

    Args:
        images: as of `read_images`: to prune on before anything is rounded.
    """
    for rung in rungs:
        if images is not None and rung in PRUNED_LAYERS:
            prune_on_images_(sam.image_encoder, images, PRUNED_LAYERS[rung])
    build_rungs(sam.image_encoder, [rung for rung in rungs if rung == "bf16"], _CPU)
    largest = {
        f"image_encoder.{name}.weight": layer.weight.detach().abs().amax(1)
        for name, layer in find_linears(sam.image_encoder, "all").items()
    }
    build_rungs(sam.image_encoder, [rung for rung in rungs if rung != "bf16"], _CPU)
    tensors: dict[str, Tensor] = {}
    for name, weight in sam.state_dict().items():
        is_int8 = hasattr(weight, "qdata")
        tensors |= pack_rows(name, weight.qdata, weight.scale, largest[name]) if is_int8 else {name: weight}
    return tensors


def check_precision_of_file(optimisation: Optimisation | None, choice: PrecisionChoice, device: torch.device) -> None:
    """Raises SettingsProblem unless a service's precision is that of the file, and its device too."""
    if optimisation is None:
        return
    made_for = optimisation.precision
    source = f"or give the checkpoint it was made from (SHA-256 {optimisation.source_sha256[:12]}...)"
    if choice.precision != made_for:
        raise SettingsProblem(
            f"precision: the checkpoint was optimised for {made_for}, not for {choice.precision}: "
            f"add --precision {made_for}, {source}"
        )
    if optimisation.rungs != _on_weights(choice.rungs):
        other = _only_for(made_for, optimisation.rungs) or "another device"
        raise SettingsProblem(
            f"precision: the checkpoint was optimised for {made_for} on {other}, not on {device}: "
            f"make one with `splitsam optimize --device {device.type}`, {source}"
        )


def _only_for(precision: str, rungs: tuple[str, ...]) -> str | None:
    """The one kind of device where a precision has these rungs; None if both have, or neither."""
    devices = [device for device in _DEVICES if _on_weights(rungs_of(device).get(precision, ())) == rungs]
    return devices[0] if len(devices) == 1 else None


def _check_source(loaded: LoadedModel, out: Path) -> None:
    if loaded.optimisation is not None:
        done = loaded.optimisation
        raise CheckpointError(
            f"{loaded.path} is already optimised, for {done.precision}: "
            f"start from the checkpoint it was made from (SHA-256 {done.source_sha256[:12]}...)"
        )
    if out.exists() and out.samefile(loaded.path):
        raise CheckpointError(f"--out {out} is the checkpoint itself: give another name")


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings: torchao, once imported, lists the parts for GPUs that it could not load."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def draft_of(out: Path) -> Iterator[Path]:
    """A file beside `out` that takes its name when all went well, and otherwise leaves no trace."""
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(f"{out.name}.{os.getpid()}.part")
    draft.touch()  # a folder that cannot be written to is found out before the work
    mode = draft.stat().st_mode
    try:
        yield draft
        draft.chmod(mode)  # safetensors leaves a file that only its owner can read
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, out)
    finally:
        draft.unlink(missing_ok=True)
