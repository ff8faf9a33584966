"""The decoder service's own functions, in the order in which it calls them, without its queue and its wire."""

from collections.abc import Sequence

import numpy as np
import torch

from bench.decoder.scenes import HEIGHT, WIDTH, Rle, Scene
from splitsam.common.sam_modules import Sam
from splitsam.decoder_service.candidates import Candidate, Thresholds, drop_doubles, sift
from splitsam.decoder_service.crops import View
from splitsam.decoder_service.cutting import Cut
from splitsam.decoder_service.everything import write_candidate
from splitsam.decoder_service.everything_request import build_point_grid
from splitsam.decoder_service.masks import Mask, write_masks
from splitsam.decoder_service.model import DecoderModel, PromptLogits
from splitsam.decoder_service.packing import ImageJob
from splitsam.decoder_service.prompts import OutputOptions, Prompt, Selection

SIZE = (HEIGHT, WIDTH)
LABEL = np.ones(1, np.int64)
CUT = Cut()


class Ours:
    """Jobs on prepared embeddings, one for each scene; as parsed from requests before anything is timed."""

    def __init__(self, sam: Sam, scenes: Sequence[Scene], device: torch.device, precision: str, prompts: int) -> None:
        self.model = DecoderModel(sam, device, "bf16" if precision == "bf16" else "fp32", prompts, kernels=True)
        self.model.capture()
        self._prompts = prompts
        self._prepared = {id(scene): self.model.prepare(scene.embedding) for scene in scenes}
        self._jobs = {
            (selection, cut): [self._job(scene, scene.clicks, selection, cut) for scene in scenes]
            for selection in Selection
            for cut in (None, CUT)
        }

    def click(self, scene: Scene, point: np.ndarray) -> Rle:
        [rle] = self._segment([self._job(scene, point[None], Selection.BEST)])
        return rle

    def decode(self, selection: Selection = Selection.ALL) -> list[list[PromptLogits]]:
        """Logits of every click on every scene."""
        return self.model.decode(self._jobs[selection, None])

    def segment(self) -> list[Rle]:
        """The best mask of every click on every scene."""
        return self._segment(self._jobs[Selection.BEST, CUT])

    def write_all(self, scene: Scene) -> list[tuple[list[Mask], PromptLogits]]:
        """All three masks of each prompt."""
        job = self._job(scene, scene.clicks, Selection.ALL)
        [answers] = self.model.decode([job])
        return [(self._write(answer, job), answer) for answer in answers]

    def generate(self, scene: Scene, side: int, predicted_iou: float, stability: float) -> list[Mask]:
        """Everything in an image, the best first."""
        thresholds = Thresholds(predicted_iou=predicted_iou, stability_score=stability)
        points = (build_point_grid(side) * (WIDTH, HEIGHT)).astype(np.float32)
        found: list[Candidate] = []
        whole = View((0, 0, WIDTH, HEIGHT), 0)
        for start in range(0, len(points), self._prompts):
            piece = points[start : start + self._prompts]
            job = self._job(scene, piece, Selection.ALL, thresholds.cut(CUT.threshold))
            [answers] = self.model.decode([job])
            for point, answer in zip(piece, answers, strict=True):
                found += sift(answer, job, whole, (float(point[0]), float(point[1])), thresholds, 0.0)
        kept = drop_doubles(found, [candidate.predicted_iou for candidate in found], thresholds.box_nms)
        return [write_candidate(candidate, SIZE, OutputOptions(), None) for candidate in kept]

    def _segment(self, jobs: Sequence[ImageJob]) -> list[Rle]:
        answers = self.model.decode(jobs)
        return [
            to_rle(mask)
            for job, of_image in zip(jobs, answers, strict=True)
            for answer in of_image
            for mask in self._write(answer, job)
        ]

    def _write(self, answer: PromptLogits, job: ImageJob) -> list[Mask]:
        return list(
            write_masks(answer, input_size=job.input_size, original_size=job.original_size, output=OutputOptions())
        )

    def _job(self, scene: Scene, points: np.ndarray, selection: Selection, cut: Cut | None = CUT) -> ImageJob:
        return ImageJob(
            embedding=self._prepared[id(scene)],
            original_size=SIZE,
            input_size=scene.input_size,
            prompts=tuple(Prompt(point[None], LABEL) for point in points),
            selection=selection,
            cut=cut,
        )


def to_rle(mask: Mask) -> Rle:
    return {"size": list(SIZE), "counts": (mask.rle_counts or "").encode()}
