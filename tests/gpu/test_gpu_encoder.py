"""What is around the encoder on a GPU: pixels brought there, embeddings sent back, batches that overlap."""

import asyncio
import threading
import time

import numpy as np
import pytest
import torch
from random_encoders import random_encoder
from torch import nn

from splitsam.common.metrics import Metrics
from splitsam.encoder_service.model import EncoderModel
from splitsam.encoder_service.preprocess import PreparedImage
from splitsam.encoder_service.service import EncoderService
from splitsam.encoder_service.settings import EncoderSettings

GPU = torch.device("cuda", 0)
MEAN, STD = torch.tensor([123.675, 116.28, 103.53])[:, None, None], torch.tensor([58.395, 57.12, 57.375])[:, None, None]
SIZES = [(1024, 683), (683, 1024), (1024, 1024), (1024, 1), (1, 1024), (1024, 576)]


def image_of(size: tuple[int, int], seed: int = 0) -> PreparedImage:
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PreparedImage(pixels, size, size, 0)


class Slow(nn.Module):
    """Answers with its images, after the device was busy for some 20 ms."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.is_cuda:
            torch.cuda._sleep(40_000_000)
        return images.clone()


def model_on(device: torch.device, dtype: torch.dtype = torch.float32) -> EncoderModel:
    return EncoderModel(Slow(), MEAN, STD, device=device, batch_sizes=(1, 4), embedding_dtype=dtype)


@pytest.mark.parametrize("pinned", [False, True])
def test_images_are_normalised_as_on_the_cpu(pinned: bool):
    images = [image_of(size, seed) for seed, size in enumerate(SIZES)]
    model = model_on(GPU)
    found = model.encode([model.pin(image) for image in images] if pinned else images)
    for one, other in zip(found, model_on(torch.device("cpu")).encode(images), strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=0)


def encode_at_once(model: EncoderModel, batches: list[list[PreparedImage]]) -> tuple[list[list[torch.Tensor]], int]:
    """Embeddings of batches that are all in work, and how often the event loop had time for others."""

    async def overlap() -> tuple[list[list[torch.Tensor]], int]:
        working = asyncio.gather(*(model.encode_on_loop(batch) for batch in batches))
        others_turns = 0
        while not working.done():
            others_turns += 1
            await asyncio.sleep(0)
        return working.result(), others_turns

    return asyncio.run(overlap())


def pinned_batches(model: EncoderModel) -> list[list[PreparedImage]]:
    return [[model.pin(image_of(SIZES[(i + j) % 6], 10 * i + j)) for j in range(1 + i % 5)] for i in range(8)]


def assert_equal(found: list[list[torch.Tensor]], expected: list[list[torch.Tensor]]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_batches_that_overlap_keep_apart(dtype: torch.dtype):
    model = model_on(GPU, dtype)
    batches = pinned_batches(model)
    expected = [model.encode(batch) for batch in batches]
    encode_at_once(model, batches)  # takes the memory that so many at once need, and waits for the device to get it
    found, others_turns = encode_at_once(model, batches)
    assert_equal(found, expected)
    assert others_turns > 50


def test_batches_that_overlap_in_graphs_keep_apart():
    """All graphs have one buffer of images and one of embeddings."""
    options = {"rungs": ("bf16", "compile", "sdpa"), "batch_sizes": (1, 4), "embedding_dtype": torch.float16}
    model = EncoderModel(random_encoder(64, side_px=1024, heads=4), MEAN, STD, device=GPU, **options)
    model.warm_up()
    batches = pinned_batches(model)
    expected = [model.encode(batch) for batch in batches]
    torch.cuda._sleep(200_000_000)  # clock cycles: all are brought and launched before the first is computed
    found, _ = encode_at_once(model, batches)
    assert_equal(found, expected)


@pytest.mark.parametrize(("precision", "is_on_loop"), [("fp32", False), ("bf16", True)])
async def test_only_an_encoder_that_waits_for_nothing_runs_on_the_event_loop(
    precision: str, is_on_loop: bool, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
):
    run, threads = EncoderModel._run, []

    def noted(model: EncoderModel, batch: torch.Tensor) -> torch.Tensor:
        threads.append(threading.current_thread())
        return run(model, batch)

    monkeypatch.setattr(EncoderModel, "_run", noted)
    settings = EncoderSettings.load(["--device", "cuda", "--precision", precision, "--batch-sizes", "1,4"])
    service = EncoderService(settings, metrics)
    await service.open()
    threads.clear()  # of the warm-up
    waits = [service._batcher.submit(image_of(size), deadline_s=time.monotonic() + 60) for size in SIZES]
    served = await asyncio.gather(*waits)
    await service.close()
    assert all(one.value.shape == (256, 64, 64) and one.value.isfinite().all() for one in served)
    assert {thread is threading.main_thread() for thread in threads} == {is_on_loop}
