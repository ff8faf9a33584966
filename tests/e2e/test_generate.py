"""Everything mode over gRPC: masks, refusals, tenants, and streams that end early."""

import dataclasses
import math

import pytest
from e2e_support import ask, decode_rle, draw, image_file, metric, point, prompt, refusal, wait_until, write_embedding
from grpc import RpcError, StatusCode

from splitsam.client import AsyncClient, SplitsamError
from splitsam.v1 import decoder_pb2 as pb

# Random weights are sure of nothing.
LENIENT = {"predicted_iou_threshold": 0.0, "stability_score_threshold": 0.0}
CENTRE = pb.PointGrid(xy=[0.5, 0.5])
IMAGE = {"embedding_key": None, "image": b"any"}
BAD = {
    "no source": ({"embedding_key": None}, "embedding_key", "64"),
    "malformed key": ({"embedding_key": "12"}, "embedding_key", "64"),
    "no points": ({"points_per_side": 0}, "points_per_side", "1 to 32"),
    "too many points": ({"points_per_side": 33}, "points_per_side", "1024"),
    "grid of half a point": ({"point_grid": [0.1, 0.2, 0.3]}, "point_grid", "an x and a y"),
    "grid of too many points": ({"point_grid": [0.5] * 2050}, "point_grid", "at most 1024"),
    "grid outside": ({"point_grid": [0.1, 0.2, 0.3, 1.5]}, "point_grid[3]", "0 to 1"),
    "grid not a number": ({"point_grid": [math.nan, 0.2]}, "point_grid[0]", "0 to 1"),
    "two grids": ({"point_grid": [0.5, 0.5], "points_per_side": 2}, "point_grid", "one of them"),
    "no points in a batch": ({"points_per_batch": 0}, "points_per_batch", "1 or more"),
    "predicted IoU": ({"predicted_iou_threshold": 1.5}, "predicted_iou_threshold", "0 to 1"),
    "stability": ({"stability_score_threshold": -0.1}, "stability_score_threshold", "0 to 1"),
    "offset": ({"stability_score_offset": math.inf}, "stability_score_offset", "0 to 100"),
    "box NMS": ({"box_nms_threshold": math.nan}, "box_nms_threshold", "0 to 1"),
    "crop NMS": ({"crop_nms_threshold": 2}, "crop_nms_threshold", "0 to 1"),
    "crops of a key": ({"crop_layers": 1}, "crop_layers", "image"),
    "too many layers": (IMAGE | {"crop_layers": 3}, "crop_layers", "0 to 2"),
    "overlap": ({"crop_overlap_ratio": 1.5}, "crop_overlap_ratio", "0 to 1"),
    "points divided by nothing": ({"crop_points_downscale_factor": 0}, "crop_points_downscale_factor", "1 or more"),
    "no points in a layer": (
        IMAGE | {"crop_layers": 2, "crop_points_downscale_factor": 6},
        "crop_points_downscale_factor",
        "layer 2",
    ),
    "crops' grids alone": ({"crop_point_grids": [CENTRE]}, "crop_point_grids", "point_grid"),
    "a grid missing": (IMAGE | {"crop_layers": 1, "point_grid": [0.5, 0.5]}, "crop_point_grids", "as many"),
    "empty grid of crops": (
        IMAGE | {"crop_layers": 1, "point_grid": [0.5, 0.5], "crop_point_grids": [pb.PointGrid()]},
        "crop_point_grids[0].xy",
        "1 to at most 1024",
    ),
    "too many points in all": (IMAGE | {"crop_layers": 2}, "points_per_side", "16384"),
    "no image": ({"embedding_key": None, "image": b""}, "image", "33554432"),
    "not an image": ({"embedding_key": None, "image": b"no image"}, "image", "JPEG"),
    "image too small for its crops": (
        {"embedding_key": None, "image": image_file(draw(1, (3, 2))), "crop_layers": 2, "points_per_side": 4},
        "crop_layers",
        "3 x 2",
    ),
    "format": ({"output": pb.OutputOptions(formats=[0])}, "output.formats[0]", "RLE"),
    "mask threshold": ({"output": pb.OutputOptions(mask_threshold=101)}, "output.mask_threshold", "-100 to 100"),
}


def search(caller, key, timeout_s=60.0, **options):
    request = pb.GenerateMasksRequest(**({"embedding_key": key} | options))
    return caller.decoder.GenerateMasks(request, **caller.options(timeout_s))


def test_masks_are_those_of_clicks_on_the_grid(alpha, key):
    found = list(search(alpha, key, points_per_side=2, **LENIENT))
    assert found
    for one in found:
        asked = prompt(point(one.point.x, one.point.y))
        [clicked] = alpha.click(key, asked, selection=pb.MASK_SELECTION_ALL)
        mask = clicked.masks[one.mask.mask_index - 1]
        assert (decode_rle(one.mask.rle) == decode_rle(mask.rle)).mean() >= 0.999
        assert one.mask.predicted_iou == pytest.approx(mask.predicted_iou, abs=1e-4)
        assert (one.image_size.width, one.image_size.height) == (320, 240)
    points = {(one.point.x, one.point.y) for one in found}
    assert points <= {(80, 60), (240, 60), (80, 180), (240, 180)}
    scores = [one.mask.predicted_iou for one in found]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("case", BAD)
def test_bad_request_is_refused_with_field_and_limit(alpha, key, case):
    options, field, limit = BAD[case]
    refused = refusal(lambda: list(search(alpha, key, **options)))
    assert (refused.code, refused.reason) == (StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")
    assert refused.fields.keys() == {field}
    assert limit in refused.fields[field]


def test_unknown_key_and_that_of_another_tenant_are_not_found(alpha, beta, stack, model_id):
    own = write_embedding(stack, "alpha", model_id, "alpha's alone, searched for everything")
    for caller, used_key in ((alpha, "0" * 64), (beta, own)):
        refused = refusal(lambda caller=caller, used_key=used_key: list(search(caller, used_key, points_per_side=1)))
        assert (refused.code, refused.reason) == (StatusCode.NOT_FOUND, "EMBEDDING_EXPIRED")
    list(search(alpha, own, points_per_side=1))


@pytest.mark.parametrize("end", ["cancel", "deadline"])
def test_stream_that_ends_early_frees_the_decoder(alpha, key, stack, on_gpu, end):
    url = stack.metrics_url("decoder")

    def counted(name, **labels):
        return metric(url, name, **labels)

    ended = counted("splitsam_requests_total", method="GenerateMasks")
    batches = counted("splitsam_batch_fill_count", batcher="decoder")
    deadline_s = 0.05 if on_gpu else 3.0  # less than the search takes
    masks = search(alpha, key, timeout_s=60.0 if end == "cancel" else deadline_s, points_per_side=32)
    wait_until(lambda: counted("splitsam_batch_fill_count", batcher="decoder") > batches, "the decoder works")
    if end == "cancel":
        masks.cancel()
    with pytest.raises(RpcError):
        list(masks)
    wait_until(lambda: counted("splitsam_requests_total", method="GenerateMasks") > ended, "it has ended")
    [answer] = alpha.click(key, prompt(point(10, 10)))
    assert answer.masks
    idle = counted("splitsam_batch_fill_count", batcher="decoder")
    alpha.predict(ask({key: [prompt(point(10, 10))]}))
    assert counted("splitsam_batch_fill_count", batcher="decoder") == idle + 1  # nobody else is served any more


def test_client_finds_everything(client, key):
    found = list(client.generate(key, point_grid=[(0.25, 0.25), (0.75, 0.5)], output={"formats": ["bits"]}, **LENIENT))
    assert found
    for one in found:
        assert one.point in ((80, 60), (240, 120))
        assert one.mask.to_array().sum() == one.mask.area_px > 0


async def test_asyncio_client_finds_everything(stack, alpha, key):
    async with AsyncClient(stack.encoder, stack.decoder, token=alpha.token) as client:
        found = [one async for one in client.generate(key, points_per_side=1, **LENIENT)]
        assert found
        with pytest.raises(SplitsamError) as caught:
            [one async for one in client.generate(key, points_per_side=33)]
    assert caught.value.reason == "INVALID_ARGUMENT"


def test_client_encodes_again_when_the_embedding_has_expired(client, photo, key):
    image = dataclasses.replace(client.encode(photo), key="0" * 64)
    found = list(client.generate(image, points_per_side=1, **LENIENT))
    assert [one.mask.rle for one in found] == [
        one.mask.rle for one in client.generate(key, points_per_side=1, **LENIENT)
    ]
