import io

import cv2
import numpy as np
import pytest
from e2e_support import BACKGROUND, ask, decode_rle, logits_in_redis, point, prompt, redis_of, refusal, write_embedding
from grpc import StatusCode
from PIL import Image

from splitsam.v1 import decoder_pb2 as pb

WIDTH, HEIGHT = 320, 240
ALL_FORMATS = [number for number in pb.MaskFormat.values() if number != pb.MASK_FORMAT_UNSPECIFIED]
LOGITS = [pb.MASK_FORMAT_LOW_RES_LOGITS]
CLICK = prompt(point(100, 120))


def rasterise(polygons):
    """A ring's points are pixels of the mask itself, around holes too."""
    bitmap = np.zeros((HEIGHT, WIDTH), np.uint8)
    for piece in polygons.polygons:
        outer, *holes = (np.array(ring.xy, np.int32).reshape(-1, 1, 2) for ring in (piece.outer, *piece.holes))
        own = cv2.fillPoly(np.zeros_like(bitmap), [outer], 1)
        for hole in holes:
            inside = cv2.fillPoly(np.zeros_like(bitmap), [hole], 1)
            own &= ~(inside & ~cv2.polylines(np.zeros_like(bitmap), [hole], True, 1)) & 1
        bitmap |= own
    return bitmap.astype(bool)


def assert_same_logits(one, other):
    """Equal but for the rounding of other batch shapes, in fp32 and then to fp16."""
    assert one.mask_index == other.mask_index
    logits = [np.frombuffer(mask.low_res_logits, "<f2").astype(np.float32) for mask in (one, other)]
    np.testing.assert_allclose(*logits, atol=1e-4, rtol=2**-10)


@pytest.fixture(scope="module")
def three(alpha, key):
    """All three masks of one click, in all formats, with exact polygons."""
    options = {"selection": pb.MASK_SELECTION_ALL, "formats": ALL_FORMATS, "polygon_tolerance_px": 0}
    [answer] = alpha.click(key, CLICK, **options)
    return list(answer.masks)


def test_formats_hold_the_same_mask(three):
    assert [mask.mask_index for mask in three] == [1, 2, 3]
    for mask in three:
        from_rle = decode_rle(mask.rle)
        assert from_rle.shape == (HEIGHT, WIDTH)
        assert 0 < from_rle.sum() < from_rle.size  # or the comparisons below would say little
        png = Image.open(io.BytesIO(mask.png))
        assert png.mode == "L"
        np.testing.assert_array_equal(np.asarray(png), 255 * from_rle.astype(np.uint8))
        bits = np.unpackbits(np.frombuffer(mask.bits, np.uint8), count=WIDTH * HEIGHT, bitorder="little")
        np.testing.assert_array_equal(bits.reshape(HEIGHT, WIDTH).astype(bool), from_rle)
        np.testing.assert_array_equal(rasterise(mask.polygons), from_rle)
        logits = np.frombuffer(mask.low_res_logits, "<f2")
        assert logits.nbytes == 131072
        assert np.isfinite(logits).all()


def test_measures_are_those_of_the_mask(three):
    for mask in three:
        pixels = decode_rle(mask.rle)
        rows, columns = np.nonzero(pixels)
        assert mask.area_px == pixels.sum()
        box = mask.box.x0, mask.box.y0, mask.box.x1, mask.box.y1
        assert box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert 0 <= mask.stability_score <= 1


def test_polygons_stray_no_further_than_asked(alpha, key):
    coarse, exact = (
        alpha.click(key, CLICK, formats=[pb.MASK_FORMAT_POLYGONS], polygon_tolerance_px=tolerance)[0].masks[0]
        for tolerance in (2, 0)
    )
    counts = [sum(len(piece.outer.xy) for piece in mask.polygons.polygons) for mask in (coarse, exact)]
    assert counts[0] < counts[1]
    assert len(coarse.polygons.polygons) == len(exact.polygons.polygons)


def test_reply_holds_rle_alone_by_default(alpha, key):
    [[mask]] = [answer.masks for answer in alpha.click(key, CLICK)]
    formats = {"rle", "png", "polygons", "bits", "low_res_logits", "refinement_token"}
    assert {field.name for field, _ in mask.ListFields()} & formats == {"rle"}


@pytest.mark.parametrize(
    ("asked", "ambiguous"),
    [
        (CLICK, True),
        (prompt(box=(20, 30, 200, 180)), True),
        (prompt(point(100, 120), point(10, 10, BACKGROUND)), False),
        (prompt(point(100, 120), box=(20, 30, 200, 180)), False),
        (prompt(point(100, 120), low_res_logits=bytes(131072)), False),
        (prompt(low_res_logits=bytes(131072)), False),
    ],
    ids=["point", "box", "points", "point and box", "point and mask", "mask"],
)
def test_selection_decides_which_masks_answer(alpha, key, asked, ambiguous):
    chosen = [alpha.click(key, asked, selection=number, formats=LOGITS)[0].masks for number in range(4)]
    unset, single, best, every = (list(masks) for masks in chosen)
    assert [mask.mask_index for mask in single] == [0]
    assert [mask.mask_index for mask in every] == [1, 2, 3]
    [winner] = best
    assert_same_logits(winner, max(every, key=lambda mask: mask.predicted_iou))
    assert unset == (best if ambiguous else single)


def test_several_images_and_prompts_answer_in_order(alpha, stack, model_id, key):
    wide = write_embedding(stack, "alpha", model_id, "wide", size=(400, 100))
    prompts = {
        wide: [prompt(point(390, 5)), prompt(box=(0, 0, 400, 100)), prompt(point(1, 1), point(399, 99, BACKGROUND))],
        key: [prompt(point(5, 235)), CLICK],
    }
    answer = alpha.predict(ask(prompts, formats=LOGITS))
    assert [image.embedding_key for image in answer.images] == [wide, key]
    assert [(image.image_size.width, image.image_size.height) for image in answer.images] == [(400, 100), (320, 240)]
    for image in answer.images:
        for asked, together in zip(prompts[image.embedding_key], image.prompts, strict=True):
            [alone] = alpha.click(image.embedding_key, asked, formats=LOGITS)
            assert_same_logits(together.masks[0], alone.masks[0])
    assert answer.timings.model_ms > 0


def test_refinement_token_equals_sending_the_logits(alpha, key):
    [first] = alpha.click(key, CLICK, refinement_tokens=True, formats=LOGITS)
    [mask] = first.masks
    more = point(200, 60, BACKGROUND), point(100, 120)
    [by_token] = alpha.click(key, prompt(*more, refinement_token=mask.refinement_token), formats=LOGITS)
    [by_logits] = alpha.click(key, prompt(*more, low_res_logits=mask.low_res_logits), formats=LOGITS)
    [without] = alpha.click(key, prompt(*more), formats=LOGITS)
    assert by_token.masks == by_logits.masks
    assert by_token.masks[0].low_res_logits != without.masks[0].low_res_logits


def test_refinement_token_alone_is_a_prompt(alpha, key):
    [first] = alpha.click(key, CLICK, refinement_tokens=True, selection=pb.MASK_SELECTION_ALL)
    tokens = [mask.refinement_token for mask in first.masks]
    assert len(set(tokens)) == 3
    answers = alpha.click(key, *(prompt(refinement_token=token) for token in tokens), formats=LOGITS)
    assert len({answer.masks[0].low_res_logits for answer in answers}) == 3


def test_refinement_logits_live_ten_minutes_in_redis(alpha, stack, key):
    [first] = alpha.click(key, CLICK, refinement_tokens=True)
    name = logits_in_redis(stack, first.masks[0].refinement_token)
    with redis_of(stack) as connection:
        assert 590 <= connection.ttl(name) <= 600


def test_threshold_moves_the_mask(alpha, key):
    low, high = (alpha.click(key, CLICK, mask_threshold=threshold)[0].masks[0] for threshold in (-100, 100))
    assert low.area_px == WIDTH * HEIGHT
    assert high.area_px == 0
    assert not high.HasField("box")
    assert high.stability_score == 0
    assert not decode_rle(high.rle).any()


def test_reply_too_large_for_a_stock_client_is_refused(alpha, key):
    many = [CLICK] * 40
    refused = refusal(lambda: alpha.click(key, *many, formats=LOGITS))
    assert (refused.code, refused.reason) == (StatusCode.RESOURCE_EXHAUSTED, "REPLY_TOO_LARGE")
    assert "4194304" in refused.message
    assert refused.retry_s is None


def test_client_library_segments_a_path(client, tmp_path, photo, key):
    (tmp_path / "photo.png").write_bytes(photo)
    image = client.encode(tmp_path / "photo.png")
    assert (image.key, image.cache_hit, image.width_px, image.height_px) == (key, True, WIDTH, HEIGHT)
    [mask] = client.predict(image, points=[(100, 120)], formats=["rle", "png"], refinement_tokens=True)
    assert mask.to_array().sum() == mask.area_px
    [refined] = client.predict(image, points=[(100, 120), (9, 9)], labels=[1, 0], mask_input=mask)
    assert refined.index == 0
