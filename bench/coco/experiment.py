"""Runs the rungs of `bench.coco` one after the other over the images that have no row yet.

fp32 comes first and leaves its masks in its rows; the other rungs are compared with those. A rung is built only when
there is something to do for it, and dropped before the next.
"""

import copy
import itertools
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from bench.coco.dataset import CocoImage, LoadedImage, load_image
from bench.coco.rows import Row, RowFile
from bench.coco.scores import Score, score_image
from bench.pruning import Sources
from splitsam.client.coco_file import DatasetError
from splitsam.common.checkpoints import LoadedModel
from splitsam.common.precision import DTYPES, exact_convolutions
from splitsam.common.sam_modules import Sam
from splitsam.common.shapes import IMAGE_SIDE_PX
from splitsam.decoder_service.model import DecoderModel
from splitsam.encoder_service.optimize import BESIDE, RUNGS, build_rungs, unsupported

REFERENCE = "fp32"
LADDER = (*RUNGS, *BESIDE)
IMAGES_AHEAD = 4
PROBLEMS_SHOWN = 20


class Problems:
    """Lines about what cannot be used, each shown once and above the progress bar; only the first few are shown."""

    def __init__(self) -> None:
        self._seen: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._seen)

    def report(self, lines: Iterable[str]) -> None:
        for line in lines:
            if line not in self._seen and len(self._seen) < PROBLEMS_SHOWN:
                tqdm.write(f"left out: {line}", file=sys.stderr)
            self._seen[line] = None


class RungEncoder:
    """The image encoder with some rungs, one image at a time; warm once it is built."""

    def __init__(self, sam: Sam, source: nn.Module, rungs: Sequence[str], device: torch.device) -> None:
        # What earlier rungs compiled of the same code counts towards the limit of recompilations.
        torch.compiler.reset()
        self._sam, self._device = sam, device
        self._dtype = DTYPES["bf16" if "bf16" in rungs else REFERENCE]
        self._encoder = build_rungs(copy.deepcopy(source), rungs, device)
        self._run(torch.zeros(3, IMAGE_SIDE_PX, IMAGE_SIDE_PX))

    def encode(self, loaded: LoadedImage) -> torch.Tensor:
        """Returns [256, 64, 64] float32 on the device."""
        return self._run(self._sam.preprocess(torch.from_numpy(loaded.prepared.pixels).permute(2, 0, 1)))

    @torch.inference_mode()
    def _run(self, frame: torch.Tensor) -> torch.Tensor:
        with exact_convolutions(self._device, self._dtype):
            embeddings: torch.Tensor = self._encoder(frame[None].to(self._device))
        return embeddings[0].float()


@dataclass(frozen=True)
class Experiment:
    """What the rungs of one run share."""

    model: LoadedModel
    sources: Sources
    device: torch.device
    decoder: DecoderModel
    images: Sequence[CocoImage]
    rows: RowFile
    problems: Problems

    def todo(self, rung: str) -> list[CocoImage]:
        """Images without a row. An image that fp32 could not do has nothing to be compared with."""
        missing = [image for image in self.images if (rung, image.id) not in self.rows.rows]
        return [image for image in missing if rung == REFERENCE or (REFERENCE, image.id) in self.rows.rows]

    def scores(self, rung: str) -> list[Score]:
        found = [self.rows.rows.get((rung, image.id)) for image in self.images]
        return [score for row in found if row is not None for score in row.scores]


def list_prefix(rung: str, device: torch.device) -> list[str]:
    """This rung on all below it, or below the one whose place it takes, that the device can do."""
    below = RUNGS[: RUNGS.index(BESIDE.get(rung, rung))]
    return [*(name for name in below if unsupported(name, device) is None), rung]


def choose_rungs(wanted: Sequence[str] | None, device: torch.device) -> list[str]:
    """fp32 and the rungs asked for, in the ladder's order; says what the device cannot do.

    Args:
        wanted: None for all that the device can do. One that is named is tried all the same: on a CPU some give the
            numbers without the speed.
    """
    reasons = {rung: unsupported(rung, device) for rung in wanted or RUNGS}
    for rung, reason in reasons.items():
        if reason is not None:
            print(f"rung {rung} {'is left out' if wanted is None else 'is tried, but'}: {reason}", file=sys.stderr)
    chosen = {rung for rung, reason in reasons.items() if wanted is not None or reason is None}
    return [rung for rung in LADDER if rung == REFERENCE or rung in chosen]


def load_ahead(images: Iterable[CocoImage]) -> Iterator[Future[LoadedImage]]:
    """Load the next few images on threads, in order."""
    waiting: deque[Future[LoadedImage]] = deque()
    source = iter(images)
    with ThreadPoolExecutor(IMAGES_AHEAD) as threads:
        try:
            while True:
                for image in itertools.islice(source, IMAGES_AHEAD - len(waiting)):
                    waiting.append(threads.submit(load_image, image))
                if not waiting:
                    return
                yield waiting.popleft()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


def run(experiment: Experiment, rungs: Sequence[str]) -> None:
    """Run all rungs, fp32 first, with one progress bar over (rung, image)."""
    for image in experiment.images:
        row = experiment.rows.rows.get((REFERENCE, image.id))
        experiment.problems.report(row.left_out if row is not None else ())
    pairs = [(rung, image.id) for rung in rungs for image in experiment.images]
    done = sum(pair in experiment.rows.rows for pair in pairs)
    with tqdm(
        total=len(pairs), initial=done, unit="img", disable=None, file=sys.stderr, dynamic_ncols=True
    ) as progress:
        for rung in rungs:
            progress.set_description(rung)
            run_rung(experiment, rung, progress)


def run_rung(experiment: Experiment, rung: str, progress: "tqdm[Any]") -> None:
    """Score every image that has no row of this rung yet, and write its row."""
    todo = experiment.todo(rung)
    if not todo:
        return
    try:
        rungs = list_prefix(rung, experiment.device)
        source = experiment.sources.encoder(rungs)
        encoder = RungEncoder(experiment.model.sam, source, rungs, experiment.device)
    except Exception as failure:  # noqa: BLE001 one rung's failure must not stop the others
        reason = f"{type(failure).__name__}: {' '.join(str(failure).split())}"[:300]
        experiment.problems.report([f"rung {rung}: cannot be built: {reason}"])
        return
    for future in load_ahead(todo):
        try:
            loaded = future.result()
        except DatasetError as error:
            experiment.problems.report([str(error)])
        else:
            score_loaded(experiment, rung, encoder, loaded)
        progress.update()


def score_loaded(experiment: Experiment, rung: str, encoder: RungEncoder, loaded: LoadedImage) -> None:
    """Write the image's row, or report that its embedding is not finite."""
    experiment.problems.report(loaded.left_out)
    scores: tuple[Score, ...] = ()
    if loaded.objects:
        embedding = encoder.encode(loaded)
        if not embedding.isfinite().all():
            experiment.problems.report([f"{loaded.image.path}: its embedding with rung {rung} is not finite"])
            return
        # fp32 alone runs while there is no row to compare with.
        reference = experiment.rows.rows.get((REFERENCE, loaded.image.id))
        scores = score_image(loaded, embedding, experiment.decoder, reference.scores if reference is not None else None)
    experiment.rows.append(Row(rung, loaded.image.id, scores, loaded.left_out))
