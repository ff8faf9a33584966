"""The image encoder alone, as the service runs it: what encoding from end to end is set against."""

import functools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file

from bench.waterfall.subjects import load_subject
from splitsam.common.checkpoints import DEMONSTRATION_MODEL
from splitsam.common.memory import keep_freed_memory
from splitsam.common.precision import exact_convolutions
from splitsam.encoder_service.calibrator import normalise
from splitsam.encoder_service.model import EncoderModel
from splitsam.encoder_service.precision import choose_precision
from splitsam.encoder_service.preprocess import ImageLimits, prepare_image
from splitsam.encoder_service.timing import time_calls

_TIMED_S, _TIMED_CALLS = 2.0, 200


def find_weights(model: str, checkpoint: str | None, folder: Path) -> str | None:
    """The checkpoint that was asked for; None for vit_t's own; else a file in the folder with random weights."""
    if checkpoint is not None or model == DEMONSTRATION_MODEL:
        return checkpoint
    path = folder / f"{model}.safetensors"
    save_file(load_subject(model, None, outliers=False).sam.state_dict(), path)
    return str(path)


def time_model(
    model: str, checkpoint: str | None, precision: str, batch: int, device: torch.device, image: bytes
) -> float:
    """Images a second from normalised pixels on the device to embeddings there, in a process that frees the device.

    Args:
        image: of which the batch is made: a GPU's power, and with it its clock, depend on the data.

    Raises:
        CheckpointError: the checkpoint cannot be read, or is of another model.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_time_model, model, checkpoint, precision, batch, device, image).result()


def _time_model(
    model: str, checkpoint: str | None, precision: str, batch: int, device: torch.device, image: bytes
) -> float:
    keep_freed_memory()  # as the service does
    if device.type == "cuda":
        torch.cuda.set_device(device)
    sam = load_subject(model, checkpoint, outliers=False).sam
    encoder = EncoderModel(
        sam.image_encoder,
        sam.pixel_mean,
        sam.pixel_std,
        rungs=choose_precision(precision, device, "").rungs,
        device=device,
        batch_sizes=(batch,),
    )
    encoder.warm_up()
    with torch.inference_mode(), exact_convolutions(device, encoder.dtype):
        frame = normalise(prepare_image(image, ImageLimits()), sam)
        call = functools.partial(encoder.image_encoder, torch.stack([frame] * batch).to(device))
        return 1000 * batch / median(time_calls(call, device, _TIMED_S, _TIMED_CALLS))
