"""Runs the scenarios: the original first, then ours in each precision, checked before it is timed."""

import copy
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.decoder.agreement import Agreement, compare, compare_everything, make_reference
from bench.decoder.original import Annotation, Original
from bench.decoder.ours import Ours
from bench.decoder.rows import ORIGINAL, Row
from bench.decoder.scenes import HEIGHT, WIDTH, Scene, draw_clicks, draw_images
from bench.waterfall.timing import measure_peak_mib, time_calls_on_host
from splitsam.common.checkpoints import load_model
from splitsam.common.precision import exact_convolutions
from splitsam.common.sam_modules import Sam
from splitsam.decoder_service.prompts import Selection

SCENARIOS = ("click", "logits", "logits of the best", "masks", "everything")
# vit_t is far less sure of its masks than ViT-H, for which the defaults were made; the README's example has these.
PREDICTED_IOU, STABILITY = 0.4, 0.3
COMPARED_IMAGES = 4
LEAST_MIOU = {"fp32": 0.9995, "bf16": 0.97}
CLICKS = 64


class WrongAnswerError(Exception):
    """Masks that are not those of segment-anything; such a decoder is not timed."""


@dataclass(frozen=True)
class Options:
    """What to measure, and how long.

    Args:
        images: of a ragged batch; the other scenarios have one.
        clicks: on one of them, at most.
        side: points along the grid of everything mode.
        forward: prompts in one forward pass of ours.
        seconds: spent on timing a row, at most (three calls at least).
        calls: timed for a row, at most.
        deadline: of `time.monotonic`; no row is begun that may not be done by then, judged by the last one of its
            scenario.
    """

    scenarios: tuple[str, ...]
    precisions: tuple[str, ...]
    images: int
    clicks: int
    side: int
    forward: int
    device: torch.device
    seconds: float
    calls: int
    deadline: float


@dataclass(frozen=True)
class Call:
    """What is timed: a function that answers once, and how much of everything a call holds."""

    run: Callable[[], Any]
    images: int
    prompts: int
    masks: Callable[[Any], int]


def measure(options: Options, machine: dict[str, str], say: Callable[[str], None]) -> Iterator[Row]:
    """Rows in the order they are measured; what has none is said."""
    sam = load_model(model=None, checkpoint=None, sha256=None, cache_dir=Path()).sam
    with exact_convolutions(options.device, torch.float32):
        original = Original(copy.deepcopy(sam), options.device)
        scenes = make_scenes(original, options.images, options.clicks)
        yield from Bench(options, machine, say, sam, original, scenes).run()


def make_scenes(original: Original, count: int, most_clicks: int) -> list[Scene]:
    images, clicks = draw_images(count), draw_clicks(count, most_clicks)
    return [Scene(image, original.encode(image), points) for image, points in zip(images, clicks, strict=True)]


class Bench:
    """Measures all scenarios on the same scenes."""

    def __init__(
        self,
        options: Options,
        machine: dict[str, str],
        say: Callable[[str], None],
        sam: Sam,
        original: Original,
        scenes: list[Scene],
    ) -> None:
        self._options, self._machine, self._say = options, machine, say
        self._sam, self._original, self._scenes = sam, original, scenes
        self._took_s: dict[str, float] = {}
        self._baselines: dict[str, Row] = {}

    def run(self) -> Iterator[Row]:
        checked = dict(self._check())
        for scenario in self._options.scenarios:
            baseline = self._try(scenario, ORIGINAL, functools.partial(self._measure_original, scenario))
            if baseline is None:
                continue
            self._baselines[scenario] = baseline
            yield baseline
            for name, (ours, agreement) in checked.items():
                row = self._try(scenario, name, functools.partial(self._measure_ours, scenario, name, ours, agreement))
                if row is not None:
                    yield row

    def _check(self) -> Iterator[tuple[str, tuple[Ours, Agreement]]]:
        """Ours in each precision, unless its masks are not those of segment-anything."""
        options = self._options
        reference = make_reference(self._original, self._scenes[:COMPARED_IMAGES])
        for precision in options.precisions:
            name = f"splitsam {precision}"
            try:
                ours = Ours(self._sam, self._scenes, options.device, precision, options.forward)
                agreement = compare(ours, reference)
                if not agreement.miou >= LEAST_MIOU[precision]:
                    raise WrongAnswerError(f"masks agree by {agreement.miou:.4f} alone")
            except Exception as failure:  # noqa: BLE001 one precision's failure must not stop the other
                self._say(f"left out: {name}: {_describe(failure)}")
            else:
                yield name, (ours, agreement)

    def _measure_original(self, scenario: str) -> Row:
        return self._row(scenario, ORIGINAL, self._call(scenario, self._original), 1.0, 0)

    def _measure_ours(self, scenario: str, name: str, ours: Ours, agreement: Agreement) -> Row:
        call = self._call(scenario, ours)
        if scenario != "everything":
            return self._row(scenario, name, call, agreement.miou, agreement.index_flips)
        return self._row(scenario, name, call, compare_everything(call.run(), self._everything), None)

    @functools.cached_property
    def _everything(self) -> list[Annotation]:
        """What the original finds."""
        return self._original.generate(self._scenes[0], self._options.side, PREDICTED_IOU, STABILITY)

    def _call(self, scenario: str, decoder: Original | Ours) -> Call:
        options, scenes = self._options, self._scenes
        ragged = sum(len(scene.clicks) for scene in scenes)
        if scenario == "click":
            return Call(_take_turns(decoder, scenes), 1, 1, lambda _: 1)
        if scenario == "logits of the best" and isinstance(decoder, Ours):
            run = functools.partial(decoder.decode, Selection.BEST)
            return Call(run, len(scenes), ragged, lambda _: ragged)
        if scenario in ("logits", "logits of the best"):
            run = decoder.decode if isinstance(decoder, Ours) else functools.partial(decoder.decode, scenes)
            return Call(run, len(scenes), ragged, lambda _: 3 * ragged)
        if scenario == "masks":
            run = decoder.segment if isinstance(decoder, Ours) else functools.partial(decoder.segment, scenes)
            return Call(run, len(scenes), ragged, len)
        run = functools.partial(decoder.generate, scenes[0], options.side, PREDICTED_IOU, STABILITY)
        return Call(run, 1, options.side**2, len)

    def _row(self, scenario: str, name: str, call: Call, miou: float, flips: int | None) -> Row:
        options = self._options
        masks = call.masks(call.run())
        peak_mib = measure_peak_mib(call.run, options.device)
        times_ms = time_calls_on_host(call.run, options.device, options.seconds, options.calls)
        p50, p99 = (float(figure) for figure in np.quantile(times_ms, (0.5, 0.99)))
        prompts_s = 1e3 * call.prompts / p50
        baseline = self._baselines.get(scenario)
        return Row(
            scenario=scenario,
            decoder=name,
            images=call.images,
            prompts=call.prompts,
            ms_p50=p50,
            ms_p99=p99,
            prompts_s=prompts_s,
            x_original=prompts_s / baseline.prompts_s if baseline is not None else 1.0,
            peak_mib=peak_mib,
            mask_miou=miou,
            index_flips=flips,
            masks=masks,
            **self._machine,
        )

    def _try(self, scenario: str, name: str, run: Callable[[], Row]) -> Row | None:
        """None, and a printed reason, when there is no row."""
        start = time.monotonic()
        if start + self._took_s.get(scenario, 0.0) > self._options.deadline:
            self._say(f"left out: {scenario} by {name}: the time limit leaves no time for it")
            return None
        try:
            return run()
        except Exception as failure:  # noqa: BLE001 one row's failure must not stop the others
            self._say(f"left out: {scenario} by {name}: {_describe(failure)}")
            return None
        finally:
            self._took_s[scenario] = time.monotonic() - start


def _take_turns(decoder: Original | Ours, scenes: list[Scene]) -> Callable[[], Any]:
    """Clicks all over the first scene, another one in each call."""
    points = (np.random.default_rng(5).random((CLICKS, 2)) * (WIDTH, HEIGHT)).astype(np.float32)
    turn = iter(range(10**9))
    return lambda: decoder.click(scenes[0], points[next(turn) % CLICKS])


def _describe(failure: Exception) -> str:
    return f"{type(failure).__name__}: {' '.join(str(failure).split())}"[:400]
