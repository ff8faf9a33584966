"""Everything mode on the shipped vit_t against segment_anything's generator, and its manners on a shared batcher."""

import asyncio
import functools
import threading
from contextlib import aclosing
from importlib import resources
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision_shim  # noqa: F401
from PIL import Image

from splitsam.common.batcher import Batcher, Lane
from splitsam.common.cache import RecordCache
from splitsam.common.checkpoints import load_model
from splitsam.common.codecs import FP16
from splitsam.common.device_guard import DeviceGuard
from splitsam.common.errors import DeadlineTooShort, EmbeddingExpired, ReplyTooLarge
from splitsam.common.keys import KeyRing
from splitsam.common.records import EMBEDDING, SHAPES, RecordHeader, Size
from splitsam.common.rle import decode_rle
from splitsam.decoder_service import everything as everything_module
from splitsam.decoder_service.candidates import Thresholds
from splitsam.decoder_service.embeddings import EmbeddingStore
from splitsam.decoder_service.everything import Everything
from splitsam.decoder_service.everything_request import EverythingRequest, build_point_grid
from splitsam.decoder_service.model import DecoderModel
from splitsam.decoder_service.packing import ImageJob
from splitsam.decoder_service.prompts import MaskFormat, OutputOptions, Prompt
from splitsam.decoder_service.refinements import RefinementStore
from splitsam.decoder_service.sources import KeySource

from segment_anything.automatic_mask_generator import SamAutomaticMaskGenerator  # isort: skip

MODEL_ID = "0" * 64
KEY = bytes(32)
WIDTH, HEIGHT = 480, 320
GRID = build_point_grid(8)
FAR_S = 1e9
# The demonstration model is far less sure of its masks than ViT-H, whose thresholds are the defaults.
LENIENT = Thresholds(predicted_iou=0.35, stability_score=0.15)
KEEP_ALL = Thresholds(predicted_iou=0.0, stability_score=0.0)


@functools.cache
def sam():
    return load_model(model=None, checkpoint=None, sha256=None, cache_dir=Path()).sam


@functools.cache
def photo():
    """[320, 480, 3] uint8 RGB."""
    data = resources.files("splitsam.client.assets").joinpath("demo.jpg").read_bytes()
    return np.asarray(Image.open(BytesIO(data)).resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS))


@functools.cache
def generator():
    """segment_anything's generator, which encodes the photograph once and has its embedding rounded as the cache's."""
    made = SamAutomaticMaskGenerator(sam(), points_per_side=8)
    predictor = made.predictor
    predictor.set_image(photo())
    predictor.features = predictor.features.half().float()
    predictor.set_image = lambda _image: None
    predictor.reset_image = lambda: None
    return made


def reference(**knobs):
    made = generator()
    for name, value in knobs.items():
        setattr(made, name, value)
    return made.generate(photo())


@pytest.fixture
async def serve(redis_server, metrics):
    """Makes everything mode over a batcher around a function, with the photograph's embedding in a real Redis."""
    cache = RecordCache(redis_server.url, timeout_ms=30_000, connections=2, metrics=metrics)
    keys = KeyRing([b"the secret of a test"])
    started = []

    async def start(run, values=None, width=WIDTH, height=HEIGHT):
        header = RecordHeader(
            kind=EMBEDDING,
            address=keys.addresses("acme", KEY)[0],
            model_id=MODEL_ID,
            codec=FP16,
            shape=SHAPES[EMBEDDING],
            image_size=Size(width, height),
            input_size=Size(1024, round(1024 * height / width)),
            orientation=0,
        )
        await cache.put((header, torch.zeros(SHAPES[EMBEDDING]) if values is None else values), ttl_s=60)
        batcher = Batcher(
            run,
            name="decoder",
            max_weight=4,
            max_wait_ms=0,
            max_queue=9,
            metrics=metrics,
            weigh=lambda j: len(j.prompts),
        )
        batcher.start()
        stores = {"budget_bytes": 2**24, "ttl_s": 60, "metrics": metrics}
        prepare, guard = DecoderModel(sam(), "cpu").prepare, DeviceGuard(torch.device("cpu"), metrics)
        embeddings = EmbeddingStore(cache, keys, model_id=MODEL_ID, prepare=prepare, guard=guard, **stores)
        everything = Everything(
            batcher,
            RefinementStore(cache, keys, **stores),
            guard,
            piece_points=4,
            threads=1,
            max_reply_bytes=2**22,
        )
        started.append((everything, batcher))
        everything.embeddings = embeddings
        return everything, batcher

    yield start
    for everything, batcher in started:
        await everything.close()
        await batcher.close()
    await cache.close()


@pytest.fixture
async def real(serve):
    """Everything mode with the shipped weights and the photograph."""
    generator()
    everything, _ = await serve(DecoderModel(sam(), "cpu").decode, generator().predictor.features[0])
    return everything


async def collect(everything, tenant="acme", deadline_s=None, grid=GRID, **request):
    source = KeySource(everything.embeddings, tenant, KEY.hex())
    masks = everything.generate(tenant, source, EverythingRequest([grid], **request), deadline_s)
    async with aclosing(masks):
        return [found async for found in masks]


def pixels(found):
    return decode_rle(found.mask.rle_size, found.mask.rle_counts)


@pytest.mark.parametrize(
    ("thresholds", "knobs"),
    [
        (KEEP_ALL, {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}),
        (
            Thresholds(0.3, 0.5, stability_offset=0.3, box_nms=0.5, crop_nms=0.4, min_region_area_px=300),
            {
                "pred_iou_thresh": 0.3,
                "stability_score_thresh": 0.5,
                "stability_score_offset": 0.3,
                "box_nms_thresh": 0.5,
                "crop_nms_thresh": 0.4,
                "min_mask_region_area": 300,
            },
        ),
    ],
    ids=["no thresholds", "every knob"],
)
async def test_masks_are_those_of_segment_anything(real, thresholds, knobs):
    defaults = {"stability_score_offset": 1.0, "box_nms_thresh": 0.7, "crop_nms_thresh": 0.7, "min_mask_region_area": 0}
    expected = [mask for mask in reference(**(defaults | knobs)) if mask["area"]]
    found = await collect(real, thresholds=thresholds)
    assert len(expected) >= 10
    assert abs(len(found) - len(expected)) <= 0.01 * len(expected)
    overlaps = []
    for one in found:
        mask = pixels(one)
        ious = [(mask & other["segmentation"]).sum() / (mask | other["segmentation"]).sum() for other in expected]
        best = expected[int(np.argmax(ious))]
        overlaps.append(max(ious))
        assert one.mask.predicted_iou == pytest.approx(best["predicted_iou"], abs=1e-4)
        assert one.mask.stability_score == pytest.approx(best["stability_score"], abs=1e-3)
        assert one.point == pytest.approx(best["point_coords"][0])
        assert one.mask.area_px == mask.sum()
    assert np.mean(overlaps) >= 0.99
    scores = [one.mask.predicted_iou for one in found]
    assert scores == sorted(scores, reverse=True)


async def test_masks_come_in_every_format_and_can_be_refined(real):
    formats = (MaskFormat.RLE, MaskFormat.BITS, MaskFormat.LOW_RES_LOGITS)
    output = OutputOptions(formats=formats, refinement_tokens=True)
    for one in await collect(real, grid=build_point_grid(2), thresholds=LENIENT, output=output):
        bits = np.unpackbits(np.frombuffer(one.mask.bits, np.uint8), count=WIDTH * HEIGHT, bitorder="little")
        np.testing.assert_array_equal(bits.reshape(HEIGHT, WIDTH), pixels(one))
        logits = np.frombuffer(one.mask.low_res_logits, "<f2").reshape(256, 256)
        x, y = (round(side * 256 / WIDTH) for side in one.point)
        assert logits[y, x] > -3  # the logits are of this mask, which its point is in or close to
        assert len(one.mask.refinement_token) == 64


async def test_size_of_pieces_changes_no_mask(real):
    whole, cut = [
        await collect(real, grid=build_point_grid(3), thresholds=LENIENT, points_per_batch=points)
        for points in (None, 1)
    ]
    assert [one.point for one in whole] == [one.point for one in cut]
    assert np.mean([(pixels(a) == pixels(b)).mean() for a, b in zip(whole, cut, strict=True)]) >= 0.9999


class HeldModel:
    """Answers with noise, one batch at a time, each when it is let go; remembers the points of each batch."""

    def __init__(self):
        self.batches = []
        self._started = threading.Semaphore(0)
        self._go = threading.Semaphore(0)

    def __call__(self, jobs):
        self.batches.append([prompt.points[0].tolist() for job in jobs for prompt in job.prompts])
        self._started.release()
        self._go.acquire()
        return DecoderModel(sam(), "cpu").decode(jobs)

    async def batch_started(self):
        await asyncio.to_thread(self._started.acquire)

    def let_go(self, batches=1):
        self._go.release(batches)


@pytest.fixture
def held():
    model = HeldModel()
    yield model
    model.let_go(1000)


async def queued(batcher, entries):
    while len(batcher) < entries:  # noqa: ASYNC110 (a batcher has no event for it)
        await asyncio.sleep(0)


async def test_click_overtakes_queued_everything_work(serve, held):
    everything, batcher = await serve(held)
    searches = [asyncio.create_task(collect(everything, grid=build_point_grid(4))) for _ in range(2)]
    await held.batch_started()
    await queued(batcher, 1)  # the other search's piece
    point = Prompt(np.array([[7, 9]], np.float32), np.ones(1, np.int64))
    job = ImageJob(torch.zeros(SHAPES[EMBEDDING]), (HEIGHT, WIDTH), (683, 1024), (point,))
    clicked = asyncio.create_task(batcher.submit(job, deadline_s=FAR_S, lane=Lane.CLICK))
    await queued(batcher, 2)
    held.let_go(2)
    await clicked
    assert held.batches[1] == [[7.0, 9.0]]
    assert not any(search.done() for search in searches)
    held.let_go(1000)
    await asyncio.gather(*searches)


@pytest.mark.parametrize("after_batches", [1, 2])
async def test_cancelled_search_frees_its_place_at_once(serve, held, after_batches):
    everything, batcher = await serve(held)
    search = asyncio.create_task(collect(everything))
    for _ in range(after_batches):
        await held.batch_started()
        held.let_go()
    search.cancel()
    with pytest.raises(asyncio.CancelledError):
        await search
    held.let_go(1000)
    await batcher.close()
    assert len(held.batches) <= after_batches + 2  # of 16: the piece in work, and the next where it had begun


async def test_closing_the_masks_early_frees_what_is_left(real):
    source = KeySource(real.embeddings, "acme", KEY.hex())
    masks = real.generate("acme", source, EverythingRequest([build_point_grid(2)], thresholds=LENIENT), None)
    assert (await anext(masks)).size == (HEIGHT, WIDTH)
    await masks.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(masks)


async def test_search_that_outlasts_its_deadline_is_refused(real):
    with pytest.raises(DeadlineTooShort):
        await collect(real, deadline_s=0.0)


async def test_another_tenant_s_key_is_not_found(real):
    with pytest.raises(EmbeddingExpired):
        await collect(real, tenant="other")


async def test_search_without_results_ends_in_peace(real):
    assert await collect(real, grid=build_point_grid(1), thresholds=Thresholds(1.0, 1.0)) == []


async def test_masks_that_do_not_fit_are_refused(real, serve, monkeypatch):
    monkeypatch.setattr(everything_module, "MAX_CANDIDATE_BYTES", 100)
    with pytest.raises(ReplyTooLarge, match="100 bytes"):
        await collect(real, grid=build_point_grid(2), thresholds=KEEP_ALL)
    large, _ = await serve(list, width=8000, height=8000)
    with pytest.raises(ReplyTooLarge, match="BITS"):
        await collect(large, output=OutputOptions(formats=(MaskFormat.BITS,)))
