"""Measures precisions one after another, each built as a service builds it: its speed, memory and masks.

fp32       -> masks of a grid of points on each image, the reference
the others -> timed on batches of those images -> their masks compared with the reference
"""

import copy
import functools
import gc
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from statistics import median

import torch

from splitsam.common.checkpoints import LoadedModel
from splitsam.common.errors import InternalError, StartProblem
from splitsam.common.precision import exact_convolutions
from splitsam.common.sam_modules import Sam
from splitsam.encoder_service import compile_cache
from splitsam.encoder_service.calibration import (
    BROKEN_IOU,
    CalibrationReport,
    PrecisionFigures,
    name_device,
)
from splitsam.encoder_service.mask_reference import POINTS_PER_SIDE, MaskReference
from splitsam.encoder_service.model import EncoderModel
from splitsam.encoder_service.precision import choose_precision, refusal
from splitsam.encoder_service.preprocess import PreparedImage
from splitsam.encoder_service.timing import time_calls

REFERENCE = "fp32"
TIMED_CALLS = 50
TIMED_S = 2.0
_MIB = 2**20


class CalibrationProblem(StartProblem):
    """What keeps a calibration from being made; one line that says what to do."""


class _OutOfTime(Exception):
    """The time limit is over."""


class Calibrator:
    """Measures the precisions of one model on one device.

    Args:
        loaded: not changed; each precision is built from a copy of its encoder.
        images: at least one.
        batch_sizes: ascending.
        end_s: of time.monotonic(), when to stop.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        device: torch.device,
        images: Sequence[PreparedImage],
        batch_sizes: Sequence[int],
        end_s: float,
    ):
        self._loaded, self._device, self._images = loaded, device, images
        self._batch_sizes, self._end_s = batch_sizes, end_s
        self._reference = MaskReference(loaded.sam, device)
        self._slowest_s = 0.0

    def run(self, asked: Sequence[str], bound: float) -> CalibrationReport:
        """Measure fp32, then the others.

        Raises:
            CalibrationProblem: fp32 cannot be measured, so there is nothing to compare with.
        """
        precisions: dict[str, PrecisionFigures] = {}
        left_out: dict[str, str] = {}
        for name in (REFERENCE, *asked):
            outcome = self._try(name)
            if isinstance(outcome, PrecisionFigures):
                precisions[name] = outcome
            elif name == REFERENCE:
                raise CalibrationProblem(f"fp32, which the others are compared with, cannot be measured: {outcome}")
            else:
                left_out[name] = outcome
        return CalibrationReport(
            model=self._loaded.name,
            model_id=self._loaded.model_id,
            device=name_device(self._device),
            torch=torch.__version__,
            bound=bound,
            images=len(self._images),
            prompts=len(self._images) * POINTS_PER_SIDE**2,
            precisions=precisions,
            left_out=left_out,
        )

    def _try(self, name: str) -> PrecisionFigures | str:
        """The figures, or why there are none."""
        reason = refusal(name, self._device)
        if reason is not None:
            return reason
        start_s = time.monotonic()
        if start_s + self._slowest_s > self._end_s:
            return "the time limit left no time for it"
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        try:
            return self._measure_reference() if name == REFERENCE else self._measure(name, self._batch_sizes)
        except _OutOfTime:
            return "the time limit was over before it was done"
        except Exception as error:  # noqa: BLE001 one precision's failure must not stop the others
            return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        finally:
            self._slowest_s = max(self._slowest_s, time.monotonic() - start_s)
            _forget_models(self._device)

    def _measure_reference(self) -> PrecisionFigures:
        """fp32 in the batches that it has memory for: the others may well have it for larger ones."""
        for count in range(len(self._batch_sizes), 1, -1):
            try:
                return self._measure(REFERENCE, self._batch_sizes[:count])
            except torch.OutOfMemoryError:
                self._reference.clear()
            _forget_models(self._device)
        return self._measure(REFERENCE, self._batch_sizes[:1])

    def _measure(self, name: str, batch_sizes: Sequence[int]) -> PrecisionFigures:
        sam, device = self._loaded.sam, self._device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        rungs = choose_precision(name, device, self._loaded.model_id).rungs
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            model = EncoderModel(
                copy.deepcopy(sam.image_encoder),
                sam.pixel_mean,
                sam.pixel_std,
                rungs=rungs,
                device=device,
                batch_sizes=batch_sizes if device.type == "cuda" else (),
            )
            compile_cache.warm_up(model.warm_up)
            ms_per_image = {size: self._time(model, size) for size in batch_sizes}
            # Graphs keep what their capture allocated, so the peak since before it is that of the service.
            peak_mib = torch.cuda.max_memory_allocated(device) / _MIB if device.type == "cuda" else None
            ious, flips = self._compare_masks(model, batch_sizes[-1], is_reference=name == REFERENCE)
        return PrecisionFigures(
            rungs=rungs,
            mask_miou=round(float(ious.mean()), 6),
            broken_share=round(float((ious < BROKEN_IOU).float().mean()), 6),
            index_flips=flips,
            ms_per_image={size: round(ms, 4) for size, ms in ms_per_image.items()},
            peak_mib=None if peak_mib is None else round(peak_mib, 1),
        )

    @torch.inference_mode()
    def _time(self, model: EncoderModel, size: int) -> float:
        """Milliseconds an image, in batches of real ones: a GPU's power, and with it its clock, depend on the data."""
        left_s = self._time_left()
        chosen = [self._images[i % len(self._images)] for i in range(size)]
        frames = torch.stack([normalise(image, self._loaded.sam) for image in chosen]).to(self._device)
        with exact_convolutions(self._device, model.dtype):
            call = functools.partial(model.image_encoder, frames)
            return median(time_calls(call, self._device, min(TIMED_S, left_s), TIMED_CALLS)) / size

    def _compare_masks(self, model: EncoderModel, size: int, *, is_reference: bool) -> tuple[torch.Tensor, int]:
        """IoU of every prompt of every image, and how many rate another mask token best; keeps those of fp32."""
        ious, flips = [], 0
        for index, embedding in enumerate(self._encode(model, size)):
            image = self._images[index]
            if isinstance(embedding, InternalError):
                if is_reference:
                    raise embedding
                ious.append(torch.zeros(POINTS_PER_SIDE**2))
            elif is_reference:
                self._reference.keep(embedding, image.input_size)
                ious.append(torch.ones(POINTS_PER_SIDE**2))
            else:
                agreement = self._reference.compare(index, embedding)
                ious.append(agreement.ious)
                flips += agreement.index_flips
        return torch.cat(ious), flips

    def _encode(self, model: EncoderModel, size: int) -> Iterator[torch.Tensor | InternalError]:
        for start in range(0, len(self._images), size):
            self._time_left()
            yield from model.encode(self._images[start : start + size])

    def _time_left(self) -> float:
        left_s = self._end_s - time.monotonic()
        if left_s <= 0:
            raise _OutOfTime
        return left_s


def normalise(image: PreparedImage, sam: Sam) -> torch.Tensor:
    """[3, 1024, 1024] float32, as the encoder takes it."""
    frame: torch.Tensor = sam.preprocess(torch.from_numpy(image.pixels).permute(2, 0, 1))
    return frame


def _forget_models(device: torch.device) -> None:
    """Free what the last precision has left: weights, graphs, and what was compiled for it."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
