"""The decoder service without its model: `python -m bench.loop.decoder decoder --port ...`.

Once the model is loaded and warm, every batch is answered after SPLITSAM_BENCH_WAIT_MS, whatever is in it, with the
same drawn mask for each prompt: cut already and its logits on the host, as a GPU leaves them. Embeddings are prepared
by the model; all else is the service's own.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from splitsam.common.process import run_service
from splitsam.common.records import Size
from splitsam.decoder_service.cutting import CutMask
from splitsam.decoder_service.masks import encode_rle
from splitsam.decoder_service.model import PromptLogits
from splitsam.decoder_service.packing import ImageJob
from splitsam.decoder_service.service import DecoderService
from splitsam.decoder_service.settings import DecoderSettings

WAIT_MS = "SPLITSAM_BENCH_WAIT_MS"
IMAGE_SIZE = Size(1920, 1080)
_SCORE = 0.9


class WaitingDecoder(DecoderService):
    """Waits where the model would compute."""

    def _load(self) -> Any:
        model, info = super()._load()
        model.decode = answer_after(float(os.environ[WAIT_MS]) / 1000)  # type: ignore[method-assign]
        return model, info


def answer_after(wait_s: float) -> Callable[[Sequence[ImageJob]], list[list[PromptLogits]]]:
    """A model that takes the same time for any jobs and gives each prompt the same mask."""
    logits = torch.zeros(1, 256, 256, dtype=torch.float16)
    answer = PromptLogits((1,), (_SCORE,), logits, (draw_mask(),))

    def decode(jobs: Sequence[ImageJob]) -> list[list[PromptLogits]]:
        time.sleep(wait_s)
        return [[answer] * len(job.prompts) for job in jobs]

    return decode


def draw_mask() -> CutMask:
    """A disc with a ragged edge; its run lengths take about as long as those of a thing on a photograph."""
    height, width = IMAGE_SIZE.rows_columns
    y, x = np.mgrid[:height, :width]
    x, y = x - width / 2, y - height / 2
    inside = np.hypot(x, y) < 300 + 20 * np.sin(15 * np.arctan2(y, x))
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    rle = encode_rle(inside.astype(np.uint8)).encode()
    return CutMask((height, width), rle, int(inside.sum()), box, _SCORE)


if __name__ == "__main__":
    sys.exit(run_service(DecoderSettings, WaitingDecoder, sys.argv[2:]))
