"""Measures the rungs of one model on one device: builds each anew, checks its answer, and only then times it."""

import functools
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.pruning import Sources
from bench.waterfall.masks import Agreement, MaskComparison
from bench.waterfall.pipelines import NESTED, Pipeline, build_encoder, build_pipeline, rungs_up_to
from bench.waterfall.rows import BASELINE, Row
from bench.waterfall.subjects import Clicks, HeldOut, Subject, draw_clicks, draw_noise, prepare_image, relative_error
from bench.waterfall.timing import MemoryRecorder, measure_peak_mib, profile_calls
from splitsam.common.precision import exact_convolutions
from splitsam.encoder_service.optimize import FP8, SPARSE_MLP, unsupported
from splitsam.encoder_service.timing import synchronize, time_calls

FP32_ERROR = 1e-4
UNRELATED = math.sqrt(2)  # the relative error of an answer that has nothing to do with the right one
LOSSY = ("int8", "sparse", SPARSE_MLP, FP8)


class WrongAnswerError(Exception):
    """A rung's embeddings are too far from those of fp32 for its time to mean anything."""


@dataclass(frozen=True)
class Options:
    """What to measure, and how long.

    Args:
        rungs: those that get a row, in the order of the ladder; each is built on all before it, listed or not.
        seconds: spent on timing a row, at most (five calls at least).
        calls: timed for a row, at most.
        deadline: of `time.monotonic`; no row is begun that may not be done by then, judged by the slowest one so far.
        prompts: clicks an image on average, in the scope `end_to_end`.
        trace: of the last rung that the device can do, at the last batch, with a memory snapshot beside it on a GPU.
        profile_top: lines of the table of kernels of the same; none if 0.
    """

    scope: str
    batches: tuple[int, ...]
    rungs: tuple[str, ...]
    device: torch.device
    seconds: float = 4.0
    calls: int = 200
    deadline: float = math.inf
    prompts: int = 8
    trace: Path | None = None
    profile_top: int = 0


@dataclass(frozen=True)
class Measured:
    """One pipeline's figures at one batch, before they are set against others."""

    times_ms: list[float]
    peak_mib: float | None
    compile_s: float
    embedding_error: float
    agreement: Agreement | None


class Waterfall:
    """Measures the rungs of one subject on one device.

    Args:
        sources: of that subject.
        held: scenes to compare masks on, or None for none.
        machine: the columns gpu, torch, triton, commit and command.
    """

    def __init__(
        self, subject: Subject, sources: Sources, held: HeldOut | None, options: Options, machine: dict[str, str]
    ) -> None:
        self._subject, self._sources, self._options, self._machine = subject, sources, options, machine
        count = max(options.batches)
        if held is None:
            self._images = draw_noise(count)
        else:
            prepared = [prepare_image(subject.sam, image) for image in held.images[:count]]
            self._images = torch.stack([prepared[i % len(prepared)] for i in range(count)])
        self._clicks = draw_clicks(count, options.prompts)
        self._held = held
        self._slowest_s = 0.0

    def run(self) -> Iterator[Row]:
        """Rows in the order they are measured, that of segment-anything first; other outcomes are printed."""
        device = self._options.device
        with _exact_inference(device):
            self._measure_reference()
            measured = self._measure([], 1)
        baseline = self._row(BASELINE, 1, measured, None, None)
        yield baseline
        jobs = [(batch, rung) for batch in self._options.batches for rung in self._options.rungs]
        last = [(batch, rung) for batch, rung in jobs if rung not in self._prefix(rung)[1]][-1:]
        rows = [baseline]
        for batch, rung in jobs:
            with _exact_inference(device):
                tried = self._try(rung, batch, profiled=(batch, rung) in last)
            if tried is not None:
                below = (BASELINE, *rungs_up_to(self._options.scope, rung))
                before = [row for row in rows if row.batch == batch and row.rung in below]
                rows.append(self._row(rung, batch, tried, before[-1] if before else None, baseline))
                yield rows[-1]

    def _measure_reference(self) -> None:
        """Embeddings and masks of segment-anything in fp32."""
        options = self._options
        reference = build_pipeline(options.scope, self._subject.sam, self._sources.encoder(()), (), 1, options.device)
        self._embeddings = torch.cat(
            [reference.encode(image.to(options.device)).cpu() for image in torch.split(self._images, 1)]
        )
        self._comparison = None
        if self._held is not None:
            self._comparison = MaskComparison(self._held, self._subject.sam, reference, options.device)

    @functools.cached_property
    def _bf16_error(self) -> float:
        """Of segment-anything itself, cast to bf16, on the first image."""
        plain = build_encoder(self._subject.sam.image_encoder, (), 1, self._options.device).to(torch.bfloat16)
        image = self._images[:1].to(self._options.device, torch.bfloat16)
        return relative_error(plain(image).cpu(), self._embeddings[:1])

    def _try(self, rung: str, batch: int, *, profiled: bool) -> Measured | None:
        """None, and a printed reason, when the rung cannot be measured."""
        options = self._options
        start = time.monotonic()
        if start + self._slowest_s > options.deadline:
            _print_left_out(rung, batch, "the time limit leaves no time for it")
            return None
        usable, reasons = self._prefix(rung)
        if rung in reasons:
            _print_left_out(rung, batch, reasons[rung])
            return None
        try:
            return self._measure(usable, batch, profiled=profiled)
        except Exception as failure:  # noqa: BLE001 one rung's failure must not stop the others
            _print_left_out(rung, batch, f"{type(failure).__name__}: {' '.join(str(failure).split())}"[:300])
            return None
        finally:
            self._slowest_s = max(self._slowest_s, time.monotonic() - start)

    def _prefix(self, rung: str) -> tuple[list[str], dict[str, str]]:
        """What this rung is built of as far as the device can do it, and for the others why not."""
        usable, reasons = [], {}
        for name in rungs_up_to(self._options.scope, rung):
            reason = None if name == NESTED else unsupported(name, self._options.device)
            if reason is None:
                usable.append(name)
            else:
                reasons[name] = reason
        return usable, reasons

    def _measure(self, rungs: Sequence[str], batch: int, *, profiled: bool = False) -> Measured:
        """Builds a pipeline anew, checks its answer, and only then times it."""
        options = self._options
        _forget_pipelines(options.device)
        images, clicks = self._images[:batch].to(options.device), self._clicks[:batch]
        source = self._sources.encoder(rungs)
        recorder = MemoryRecorder(options.device, _snapshot_path(options.trace) if profiled else None)
        start = time.monotonic()
        # Weights that are made in inference mode could not be compiled.
        with torch.inference_mode(False), torch.no_grad():
            pipeline = build_pipeline(options.scope, self._subject.sam, source, rungs, batch, options.device)
        call = _timed_call(options.scope, pipeline, images, clicks)
        call()
        synchronize(options.device)
        compile_s = time.monotonic() - start
        # The second call is the first that is run as all later ones are: from a graph that was captured.
        error = self._check(rungs, pipeline.encode(images).cpu())
        peak_mib = measure_peak_mib(call, options.device)
        recorder.write()
        times_ms = time_calls(call, options.device, options.seconds, options.calls)
        if profiled and (options.trace is not None or options.profile_top):
            print(profile_calls(call, options.device, options.trace, options.profile_top), flush=True)
        agreement = self._comparison.compare(pipeline, batch) if self._comparison is not None else None
        return Measured(times_ms, peak_mib, compile_s, error, agreement)

    def _check(self, rungs: Sequence[str], embeddings: torch.Tensor) -> float:
        """The error against fp32.

        Raises:
            WrongAnswerError: above twice that of segment-anything in the same precision.
        """
        error = relative_error(embeddings, self._embeddings[: len(embeddings)])
        allowed = 2 * self._bf16_error if "bf16" in rungs else FP32_ERROR
        if set(LOSSY) & set(rungs):
            allowed = UNRELATED
        if not error <= allowed:
            raise WrongAnswerError(f"embedding error {error:.1e} is above {allowed:.1e}, not timed")
        return error

    def _row(self, rung: str, batch: int, measured: Measured, previous: Row | None, baseline: Row | None) -> Row:
        p50, p99 = (float(figure) for figure in np.quantile(measured.times_ms, (0.5, 0.99)))
        img_s = 1e3 * batch / p50
        agreement = measured.agreement
        return Row(
            scope=self._options.scope,
            model=self._subject.name,
            weights=self._subject.weights,
            batch=batch,
            rung=rung,
            ms_p50=p50,
            ms_p99=p99,
            img_s=img_s,
            x_prev=img_s / previous.img_s if previous is not None else None,
            x_fp32=img_s / baseline.img_s if baseline is not None else 1.0,
            peak_mib=measured.peak_mib,
            compile_s=measured.compile_s,
            embedding_error=measured.embedding_error,
            mask_miou=agreement.miou if agreement is not None else None,
            index_flips=agreement.index_flips if agreement is not None else None,
            gpu=self._machine["gpu"],
            torch=self._machine["torch"],
            triton=self._machine["triton"],
            commit=self._machine["commit"],
            command=self._machine["command"],
        )


@contextmanager
def _exact_inference(device: torch.device) -> Iterator[None]:
    with exact_convolutions(device, torch.float32), torch.inference_mode():
        yield


def _timed_call(scope: str, pipeline: Pipeline, images: torch.Tensor, clicks: Clicks) -> Callable[[], Any]:
    if scope == "encoder":
        return functools.partial(pipeline.encode, images)
    return functools.partial(pipeline.segment, images, clicks)


def _forget_pipelines(device: torch.device) -> None:
    """Frees what the last row has left: its weights, its graphs and what was compiled for it."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _print_left_out(rung: str, batch: int, reason: str) -> None:
    print(f"left out: {rung} at batch {batch}: {reason}", flush=True)


def _snapshot_path(trace: Path | None) -> Path | None:
    return trace.with_suffix(".memory.pickle") if trace is not None else None
