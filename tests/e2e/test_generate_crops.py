"""Everything mode of images that have no key, and of their crops: who encodes them, as whom, and for how long."""

import hashlib
import time

import pytest
from e2e_support import (
    DEADLINE_S,
    assert_no_leak,
    draw,
    image_file,
    metric,
    wait_until,
)
from grpc import RpcError, StatusCode

from splitsam.client.processes import LOOPBACK, free_ports
from splitsam.common.calls import Call
from splitsam.common.errors import EncoderFailed, EncoderUnavailable, InvalidArgument, NotServed, QueueFull
from splitsam.decoder_service.encoder_link import EncoderLink
from splitsam.decoder_service.settings import DecoderSettings
from splitsam.decoder_service.sources import Sources
from splitsam.v1 import decoder_pb2 as pb

LENIENT = {"predicted_iou_threshold": 0.0, "stability_score_threshold": 0.0}
CENTRE = pb.PointGrid(xy=[0.5, 0.5])
GRIDS = {"point_grid": CENTRE.xy, "crop_point_grids": [CENTRE] * 2}


def search(caller, image, timeout_s=DEADLINE_S, **options):
    request = pb.GenerateMasksRequest(image=image, **(LENIENT | options))
    return caller.decoder.GenerateMasks(request, **caller.options(timeout_s))


def corners(box):
    return box.x0, box.y0, box.x1, box.y1


def test_image_gives_the_masks_of_its_key(alpha, photo, key):
    found = list(search(alpha, photo, points_per_side=2))
    assert found
    assert {one.embedding_key for one in found} == {key}
    assert {corners(one.crop) for one in found} == {(0, 0, 320, 240)}
    of_key = pb.GenerateMasksRequest(embedding_key=key, points_per_side=2, **LENIENT)
    assert found == list(alpha.decoder.GenerateMasks(of_key, **alpha.options()))


def test_encoder_hears_the_callers_name_and_request_id(alpha, stack):
    name = "crops-of-alpha-41"
    metadata = (*alpha.options()["metadata"], ("x-request-id", name))
    request = pb.GenerateMasksRequest(image=image_file(draw(301)), points_per_side=1)
    list(alpha.decoder.GenerateMasks(request, timeout=DEADLINE_S, metadata=metadata))
    lines = [line for line in stack.children["encoder"].log_path.read_text().splitlines() if name in line]
    assert any("method=EncodeImage" in line and "tenant=alpha" in line for line in lines)


def test_client_has_no_crops_of_a_key(client, photo, key, tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(photo)
    image = client.encode(path)
    path.write_bytes(image_file(draw(304)))
    for given in (key, image):
        with pytest.raises(ValueError, match="image"):
            list(client.generate(given, crop_layers=1))


@pytest.mark.needs_slow_model
def test_caller_that_hangs_up_ends_the_encodes(alpha, stack):
    url = stack.metrics_url("encoder")

    def ended(code):
        return metric(url, "splitsam_requests_total", method="EncodeImage", code=code)

    def begun():
        return metric(url, "splitsam_image_decode_seconds_count")

    done, cancelled, before = ended("OK"), ended("CANCELLED"), begun()
    masks = search(alpha, image_file(draw(302)), crop_layers=2, **GRIDS)
    wait_until(lambda: begun() == before + 2, "the first crop is being encoded")
    masks.cancel()
    with pytest.raises(RpcError):
        list(masks)
    wait_until(lambda: ended("CANCELLED") == cancelled + 1, "its encode has ended")
    wait_until(lambda: metric(stack.metrics_url("decoder"), "splitsam_requests_in_progress") == 0, "the search, too")
    assert metric(url, "splitsam_requests_in_progress") == 0
    assert ended("OK") == done + 1


def link_to(address, **settings):
    return EncoderLink(DecoderSettings(encoder_address=address, **settings))


async def encode(link, image=b"any", authorization="Bearer alpha-token-0123456789", deadline_s=None):
    call = Call("alpha", "crops-42", "GenerateMasks", authorization=authorization)
    async with link.open(call) as encoder:
        return await encoder.encode(image, hashlib.sha256(image).digest(), None, deadline_s)


async def test_decoder_without_an_encoder_says_so():
    with pytest.raises(NotServed, match="encoder_address"):
        await encode(link_to(None))


async def test_encoder_that_is_away_is_named_with_a_time_to_come_back():
    with pytest.raises(EncoderUnavailable) as caught:
        await encode(link_to(f"{LOOPBACK}:{free_ports(1)[0]}"))
    assert caught.value.retry_delay_s
    assert_no_leak(caught.value.message)


@pytest.mark.parametrize("authorization", ["", "Bearer somebody-elses-token"])
async def test_encoder_that_does_not_know_the_caller_says_so(stack, authorization):
    with pytest.raises(EncoderFailed, match="the encoder service: authorization") as caught:
        await encode(link_to(stack.encoder), authorization=authorization)
    assert (caught.value.code, caught.value.reason) == (StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")


async def test_image_that_the_encoder_refuses_is_refused_by_its_field(stack):
    with pytest.raises(InvalidArgument) as caught:
        await encode(link_to(stack.encoder), image=b"no image")
    assert [violation.field for violation in caught.value.violations] == ["image"]


async def test_deadline_that_has_passed_is_the_callers(stack):
    unknown = image_file(draw(910))  # what is stored may be found in the millisecond that such a call is given
    with pytest.raises(EncoderFailed) as caught:
        await encode(link_to(stack.encoder), image=unknown, deadline_s=time.monotonic())
    # It ran out underway, or the service saw in time that it would.
    assert caught.value.code in (StatusCode.DEADLINE_EXCEEDED, StatusCode.RESOURCE_EXHAUSTED)
    assert caught.value.reason in ("DEADLINE_EXCEEDED", "DEADLINE_TOO_SHORT")
    assert_no_leak(caught.value.message)


async def test_searches_hold_only_so_many_bytes_of_images(stack):
    sources = Sources(None, link_to(stack.encoder), max_image_bytes=10)
    call = Call("alpha", "crops-43", "GenerateMasks")
    async with sources.open(call, bytes(20)):
        with pytest.raises(QueueFull) as caught:
            async with sources.open(call, b"1"):
                pass
        assert caught.value.retry_delay_s
        async with sources.open(call, "0" * 64):
            pass
    async with sources.open(call, bytes(6)), sources.open(call, bytes(4)):
        pass
