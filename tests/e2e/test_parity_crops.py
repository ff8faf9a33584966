"""Everything mode with crops on the shipped weights, from an image's bytes on, against segment_anything's generator."""

import io
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torchvision_shim  # noqa: F401
from e2e_support import metric
from PIL import Image

from splitsam.client import Client
from splitsam.client.stack import Stack, StackSettings
from splitsam.common.checkpoints import load_model

from segment_anything.automatic_mask_generator import SamAutomaticMaskGenerator  # isort: skip

pytestmark = pytest.mark.own_services

WIDTH, HEIGHT = 480, 320
WHOLE = (0.0, 0.0, float(WIDTH), float(HEIGHT))
# The demonstration model is far less sure of its masks than ViT-H, whose thresholds are the defaults.
OURS = {
    "points_per_side": 8,
    "crop_layers": 1,
    "crop_points_downscale_factor": 2,
    "crop_overlap_ratio": 0.3,
    "predicted_iou_threshold": 0.2,
    "stability_score_threshold": 0.2,
    "box_nms_threshold": 0.6,
    "crop_nms_threshold": 0.5,
    "min_mask_region_area_px": 50,
}
THEIRS = {
    "points_per_side": 8,
    "points_per_batch": 8,
    "crop_n_layers": 1,
    "crop_n_points_downscale_factor": 2,
    "crop_overlap_ratio": 0.3,
    "pred_iou_thresh": 0.2,
    "stability_score_thresh": 0.2,
    "box_nms_thresh": 0.6,
    "crop_nms_thresh": 0.5,
    "min_mask_region_area": 50,
}


@pytest.fixture(scope="module")
def picture():
    data = resources.files("splitsam.client.assets").joinpath("demo.jpg").read_bytes()
    return Image.open(io.BytesIO(data)).convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


@pytest.fixture(scope="module")
def reference(picture):
    sam = load_model(model=None, checkpoint=None, sha256=None, cache_dir=Path()).sam
    return SamAutomaticMaskGenerator(sam, **THEIRS).generate(np.asarray(picture))


@pytest.fixture(scope="module")
def shipped(device_args, tmp_path_factory):
    """A deployment of the shipped weights."""
    arguments = (*device_args, "--max-bulk-queue-ms", "120000", "--max-queue-ms", "120000")
    settings = StackSettings(
        encoder_args=arguments,
        decoder_args=arguments,
        run_folder=tmp_path_factory.mktemp("shipped"),
        stop_timeout_s=30.0,
    )
    with Stack(settings.on_free_ports()) as stack, Client(stack.encoder, stack.decoder, encode_timeout_s=60) as client:
        yield stack, client


@pytest.fixture(scope="module")
def image(shipped, picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return shipped[1].encode(file.getvalue())


@pytest.fixture(scope="module")
def found(shipped, image):
    return list(shipped[1].generate(image, output={"refinement_tokens": True}, **OURS))


def overlap(one, other):
    return (one & other).sum() / (one | other).sum()


@pytest.mark.long
@pytest.mark.timeout(900)  # the reference encodes five times and upsamples 384 masks in fp32
def test_masks_are_those_of_segment_anything(found, reference):
    assert len(reference) >= 10
    assert abs(len(found) - len(reference)) <= 0.01 * len(reference)
    assert sum(one.crop != WHOLE for one in found) >= 2
    for one in found:
        mask = one.mask.to_array()
        same = max(reference, key=lambda other: overlap(mask, other["segmentation"]))
        assert overlap(mask, same["segmentation"]) >= 0.99
        assert one.mask.score == pytest.approx(same["predicted_iou"], abs=1e-3)
        assert one.mask.stability == pytest.approx(same["stability_score"], abs=5e-3)
        assert one.point == pytest.approx(same["point_coords"][0])
        x, y, width, height = same["crop_box"]
        assert one.crop == (x, y, x + width, y + height)
    scores = [one.mask.score for one in found]
    assert scores == sorted(scores, reverse=True)


def test_crops_are_images_of_their_own_that_are_encoded_once(shipped, image, found):
    stack, client = shipped
    encodes = metric(stack.metrics_url("encoder"), "splitsam_requests_total", method="EncodeImage")
    assert encodes == 5
    again = list(client.generate(image, **OURS))
    assert metric(stack.metrics_url("encoder"), "splitsam_requests_total", method="EncodeImage") == encodes
    assert [one.mask.rle for one in again] == [one.mask.rle for one in found]
    assert {one.key for one in found if one.crop == WHOLE} == {image.key}


def test_crops_can_be_clicked_on_and_their_masks_refined(shipped, found):
    client = shipped[1]
    for one in (one for one in found if one.crop != WHOLE):
        x0, y0, x1, y1 = (int(edge) for edge in one.crop)
        click = [(one.point[0] - x0, one.point[1] - y0)]
        clicked = client.predict(one.key, points=click, selection="all")[one.mask.index - 1]
        # All but its small regions, which were removed.
        assert overlap(clicked.to_array(), one.mask.to_array()[y0:y1, x0:x1]) >= 0.95
        assert (clicked.width_px, clicked.height_px) == (x1 - x0, y1 - y0)
        assert client.predict(one.key, points=click, mask_input=one.mask)
