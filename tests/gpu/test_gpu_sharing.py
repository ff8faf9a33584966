"""What else runs on a GPU changes no embedding: other processes that encode, and images being decoded beside it."""

import multiprocessing
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.waterfall.subjects import load_subject
from splitsam.common.errors import InternalError
from splitsam.encoder_service.jpeg_on_gpu import JpegDecoder
from splitsam.encoder_service.model import EncoderModel
from splitsam.encoder_service.precision import choose_precision
from splitsam.encoder_service.preprocess import ImageLimits, PreparedImage

GPU = torch.device("cuda", 0)
BATCHES = (1, 4, 16)
PHOTO = (Path(__file__).parents[2] / "client/assets/demo.jpg").read_bytes()


def load() -> EncoderModel:
    """ViT-B as a service runs it in bf16."""
    sam = load_subject("vit_b", None, outliers=False).sam
    rungs = choose_precision("bf16", GPU, "").rungs
    model = EncoderModel(sam.image_encoder, sam.pixel_mean, sam.pixel_std, rungs=rungs, device=GPU, batch_sizes=BATCHES)
    model.warm_up()
    return model


def images(count: int) -> list[PreparedImage]:
    chance = np.random.default_rng(count)
    size = (1024, 683)
    return [PreparedImage(chance.integers(0, 256, (683, 1024, 3), dtype=np.uint8), size, size, 0) for _ in range(count)]


def count_changes(model: EncoderModel, seconds: float) -> tuple[int, int, int]:
    """Embeddings; of them, those that were not finite; and those that were not the first ones of their batch."""
    batches = [images(count) for count in BATCHES]
    wanted = [model.encode(batch) for batch in batches]
    made = unfinished = changed = 0
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        for batch, first in zip(batches, wanted, strict=True):
            for found, expected in zip(model.encode(batch), first, strict=True):
                made += 1
                if isinstance(found, InternalError):
                    unfinished += 1
                elif isinstance(expected, InternalError) or not torch.equal(found, expected):
                    changed += 1
    return made, unfinished, changed


def _encode(start: object, seconds: float) -> tuple[int, int, int]:
    with torch.inference_mode():
        model = load()
        start.wait()  # type: ignore[attr-defined]
        return count_changes(model, seconds)


@pytest.mark.parametrize("processes", [1, 3])
def test_processes_that_share_a_gpu_do_not_change_each_others_embeddings(processes: int):
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(processes, context) as pool:
        start = manager.Barrier(processes)
        working = [pool.submit(_encode, start, 10.0) for _ in range(processes)]
        counts = [each.result() for each in working]
    print(f"{processes} processes: embeddings, not finite, changed: {counts}")
    assert all(made > 0 for made, _, _ in counts)
    assert [(unfinished, changed) for _, unfinished, changed in counts] == [(0, 0)] * processes


def test_images_decoded_meanwhile_change_no_embedding():
    pytest.importorskip("torchvision")
    decoder = JpegDecoder(ImageLimits(), GPU)
    model = load()
    ended = threading.Event()

    def decode() -> None:
        while not ended.is_set():
            decoder.prepare(PHOTO)

    threads = [threading.Thread(target=decode) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        made, unfinished, changed = count_changes(model, 10.0)
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    print(f"embeddings {made}, not finite {unfinished}, changed {changed}")
    assert made > 0
    assert (unfinished, changed) == (0, 0)
