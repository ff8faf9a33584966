import numpy as np
import pytest

from splitsam.common.errors import InvalidArgument, ReplyTooLarge
from splitsam.decoder_service.masks import Mask, Polygon
from splitsam.decoder_service.messages import (
    ImageMasks,
    ReplyBudget,
    Timings,
    build_response,
    check_reply_can_fit,
    parse_request,
)
from splitsam.decoder_service.prompts import MaskFormat, OutputOptions, PromptLimits, Selection, validate_in_image
from splitsam.v1 import decoder_pb2 as pb
from splitsam.v1 import types_pb2

LIMITS = PromptLimits(max_images=2, max_prompts=4, max_points=3)
KEY, OTHER_KEY = "0a" * 32, "0b" * 32
NAN, INF = float("nan"), float("inf")


def point(x=1.0, y=2.0, label=pb.POINT_LABEL_FOREGROUND):
    return pb.Point(x=x, y=y, label=label)


def request(*prompts, key=KEY, **output):
    image = pb.ImagePrompts(embedding_key=key, prompts=prompts or [pb.Prompt(points=[point()])])
    return pb.PredictMasksRequest(images=[image], output=pb.OutputOptions(**output))


def several(*keys, prompts=1):
    images = [pb.ImagePrompts(embedding_key=key, prompts=[pb.Prompt(points=[point()])] * prompts) for key in keys]
    return pb.PredictMasksRequest(images=images)


def boxed(x0, y0, x1, y1):
    return request(pb.Prompt(box=pb.Box(x0=x0, y0=y0, x1=x1, y1=y1)))


def test_request_becomes_dataclasses():
    logits = (np.arange(65536) % 7 - 3).astype("<f2")
    message = request(
        pb.Prompt(points=[point(3, 4), point(5, 6, pb.POINT_LABEL_BACKGROUND)], refinement_token="t"),
        pb.Prompt(box=pb.Box(x0=1, y0=2, x1=3, y1=4), low_res_logits=logits.tobytes()),
        formats=[pb.MASK_FORMAT_PNG, pb.MASK_FORMAT_RLE],
        selection=pb.MASK_SELECTION_ALL,
        polygon_tolerance_px=0,
        refinement_tokens=True,
        mask_threshold=-2.5,
    )
    parsed = parse_request(message, LIMITS)
    assert parsed.output == OutputOptions((MaskFormat.PNG, MaskFormat.RLE), Selection.ALL, 0.0, True, -2.5)
    assert parsed.images[0].embedding_key == KEY
    first, second = parsed.images[0].prompts
    assert first.points.dtype == np.float32
    assert first.points.tolist() == [[3, 4], [5, 6]]
    assert first.labels.dtype == np.int64
    assert first.labels.tolist() == [1, 0]
    assert (first.box, first.mask_input, first.refinement_token) == (None, None, "t")
    assert second.points.shape == (0, 2)
    assert second.box.tolist() == [1, 2, 3, 4]
    np.testing.assert_array_equal(second.mask_input, logits.reshape(256, 256).astype(np.float32))


def test_unset_output_means_rle_with_the_default_selection():
    parsed = parse_request(several(KEY, OTHER_KEY), LIMITS)
    assert parsed.output == OutputOptions((MaskFormat.RLE,), None, 1.0, False, 0.0)


@pytest.mark.parametrize(
    ("prompt", "selection"),
    [
        (pb.Prompt(points=[point()]), Selection.BEST),
        (pb.Prompt(box=pb.Box(x1=1, y1=1)), Selection.BEST),
        (pb.Prompt(points=[point()] * 2), Selection.SINGLE),
        (pb.Prompt(points=[point()], box=pb.Box(x1=1, y1=1)), Selection.SINGLE),
        (pb.Prompt(points=[point()], refinement_token="t"), Selection.SINGLE),
        (pb.Prompt(low_res_logits=bytes(131072)), Selection.SINGLE),
    ],
)
def test_default_selection_is_best_for_one_ambiguous_prompt(prompt, selection):
    parsed = parse_request(request(prompt), LIMITS).images[0].prompts[0]
    assert parsed.resolve(None) is selection
    assert parsed.resolve(Selection.ALL) is Selection.ALL


@pytest.mark.parametrize(
    ("message", "field", "limit"),
    [
        (pb.PredictMasksRequest(), "images", "1 to 2 images"),
        (several(KEY, OTHER_KEY, "0c" * 32), "images", "at most 2 images; got 3"),
        (several(KEY, OTHER_KEY, prompts=3), "images[1].prompts", "at most 4 prompts"),
        (pb.PredictMasksRequest(images=[pb.ImagePrompts(embedding_key=KEY)]), "images[0].prompts", "at least 1 prompt"),
        (several(KEY, KEY), "images[1].embedding_key", "repeats images[0]; each key at most once"),
        (request(key=""), "images[0].embedding_key", "64 lower-case hex"),
        (request(key="0A" * 32), "images[0].embedding_key", "64 lower-case hex"),
        (request(key=KEY + "0"), "images[0].embedding_key", "64 lower-case hex"),
        (request(key=KEY + "\n"), "images[0].embedding_key", "64 lower-case hex"),
        (request(pb.Prompt()), "images[0].prompts[0]", "at least 1 point, a box or a mask input"),
        (request(pb.Prompt(points=[point()] * 4)), "images[0].prompts[0].points", "at most 3; got 4"),
        (
            request(pb.Prompt(points=[point()]), pb.Prompt(points=[point(), point(label=0)])),
            "images[0].prompts[1].points[1].label",
            "FOREGROUND or BACKGROUND; got 0",
        ),
        (request(pb.Prompt(points=[point(label=9)])), "images[0].prompts[0].points[0].label", "got 9"),
        (request(pb.Prompt(points=[point(x=NAN)])), "images[0].prompts[0].points[0].x", "finite"),
        (request(pb.Prompt(points=[point(), point(y=INF)])), "images[0].prompts[0].points[1].y", "finite"),
        (boxed(0, -INF, 1, 1), "images[0].prompts[0].box.y0", "finite"),
        (boxed(0, 0, NAN, 1), "images[0].prompts[0].box.x1", "finite"),
        (boxed(5, 0, 5, 1), "images[0].prompts[0].box.x0", "less than x1, 5"),
        (boxed(0, 7, 1, 6), "images[0].prompts[0].box.y0", "less than y1, 6"),
        (request(pb.Prompt(refinement_token="")), "images[0].prompts[0].refinement_token", "not be empty"),
        (
            request(pb.Prompt(low_res_logits=bytes(131070))),
            "images[0].prompts[0].low_res_logits",
            "131072 bytes, fp16 [256, 256]; got 131070",
        ),
        (
            request(pb.Prompt(low_res_logits=b"\x00\x7c" * 65536)),
            "images[0].prompts[0].low_res_logits",
            "every value must be finite",
        ),
        (request(formats=[pb.MASK_FORMAT_RLE, 0]), "output.formats[1]", "RLE, PNG, POLYGONS, BITS or LOW_RES_LOGITS"),
        (request(formats=[77]), "output.formats[0]", "got 77"),
        (request(formats=[2, 1, 2]), "output.formats[2]", "repeats PNG; each format at most once"),
        (request(selection=12), "output.selection", "unset, SINGLE, BEST or ALL; got 12"),
        (request(polygon_tolerance_px=-0.5), "output.polygon_tolerance_px", "0 to 100; got -0.5"),
        (request(polygon_tolerance_px=101), "output.polygon_tolerance_px", "0 to 100"),
        (request(polygon_tolerance_px=NAN), "output.polygon_tolerance_px", "0 to 100; got nan"),
        (request(mask_threshold=-101), "output.mask_threshold", "-100 to 100"),
        (request(mask_threshold=NAN), "output.mask_threshold", "-100 to 100; got nan"),
    ],
)
def test_bad_request_names_the_field_and_the_limit(message, field, limit):
    with pytest.raises(InvalidArgument) as caught:
        parse_request(message, LIMITS)
    [violation] = caught.value.violations
    assert violation.field == field
    assert limit in violation.description


@pytest.mark.parametrize(
    ("message", "field", "limit"),
    [
        (request(pb.Prompt(points=[point(x=-0.5)])), "images[3].prompts[0].points[0].x", "0 to 640, the image's width"),
        (request(pb.Prompt(points=[point(x=640.5)])), "images[3].prompts[0].points[0].x", "0 to 640"),
        (
            request(pb.Prompt(points=[point(), point(y=481)])),
            "images[3].prompts[0].points[1].y",
            "0 to 480, the image's h",
        ),
        (boxed(-1, 0, 5, 5), "images[3].prompts[0].box.x0", "0 to 640"),
        (boxed(0, -1, 5, 5), "images[3].prompts[0].box.y0", "0 to 480"),
        (boxed(0, 0, 641, 5), "images[3].prompts[0].box.x1", "0 to 640"),
        (boxed(0, 0, 5, 481), "images[3].prompts[0].box.y1", "0 to 480"),
    ],
)
def test_coordinates_outside_the_image_name_its_size(message, field, limit):
    image = parse_request(message, LIMITS).images[0]
    with pytest.raises(InvalidArgument) as caught:
        validate_in_image(image, 3, width=640, height=480)
    [violation] = caught.value.violations
    assert violation.field == field
    assert limit in violation.description


def test_coordinates_on_the_border_of_the_image_are_inside():
    message = request(pb.Prompt(points=[point(0, 0), point(640, 480)], box=pb.Box(x1=640, y1=480)))
    validate_in_image(parse_request(message, LIMITS).images[0], 0, width=640, height=480)


def full_mask(**changes):
    square = np.array([[0, 0], [4, 0], [4, 4]], np.float32)
    fields = {
        "mask_index": 2,
        "predicted_iou": 0.5,
        "stability_score": 0.75,
        "area_px": 9,
        "box": (1, 2, 3, 4),
        "rle_size": (20, 30),
        "rle_counts": "abc",
        "png": b"png",
        "polygons": (Polygon(square, (square + 1,)),),
        "bits": b"bits",
        "low_res_logits": b"logits",
        "refinement_token": "token",
    }
    return Mask(**(fields | changes))


def test_response_carries_every_field():
    image = ImageMasks(KEY, (20, 30), 6, ((full_mask(), full_mask(mask_index=3)), (full_mask(mask_index=0),)))
    response = build_response([image], Timings(1, 2, 3, 4), max_reply_bytes=10_000)
    [answer] = response.images
    assert (answer.embedding_key, answer.orientation) == (KEY, types_pb2.ORIENTATION_ROTATED_90)
    assert (answer.image_size.width, answer.image_size.height) == (30, 20)
    assert [[mask.mask_index for mask in prompt.masks] for prompt in answer.prompts] == [[2, 3], [0]]
    mask = answer.prompts[0].masks[0]
    assert (mask.predicted_iou, mask.stability_score, mask.area_px) == (0.5, 0.75, 9)
    assert mask.box == pb.Box(x0=1, y0=2, x1=3, y1=4)
    assert mask.rle == pb.RunLengthEncoding(size=[20, 30], counts="abc")
    assert (mask.png, mask.bits, mask.low_res_logits, mask.refinement_token) == (b"png", b"bits", b"logits", "token")
    [polygon] = mask.polygons.polygons
    assert list(polygon.outer.xy) == [0, 0, 4, 0, 4, 4]
    assert [list(hole.xy) for hole in polygon.holes] == [[1, 1, 5, 1, 5, 5]]
    assert response.timings == pb.PredictTimings(fetch_ms=1, queue_ms=2, model_ms=3, format_ms=4)


def test_empty_mask_leaves_optional_fields_unset():
    empty = Mask(mask_index=0, predicted_iou=0.1, stability_score=0, area_px=0, box=None, polygons=())
    message = build_response([ImageMasks(KEY, (2, 3), 0, ((empty,),))], Timings(), 1000).images[0].prompts[0].masks[0]
    assert [message.HasField(name) for name in ("box", "rle", "polygons")] == [False, False, True]


def test_reply_over_the_limit_says_what_to_ask_less_of():
    image = ImageMasks(KEY, (20, 30), 0, ((full_mask(png=bytes(5000)),),))
    size = build_response([image], Timings(), 10_000).ByteSize()
    assert build_response([image], Timings(), size).ByteSize() == size
    with pytest.raises(ReplyTooLarge, match=f"{size} bytes and may have {size - 1}; ask for fewer prompts"):
        build_response([image], Timings(), size - 1)


def test_reply_budget_stops_at_the_mask_that_exceeds_it():
    budget = ReplyBudget(2 * full_mask().size_bytes)
    budget.spend(full_mask())
    budget.spend(full_mask())
    with pytest.raises(ReplyTooLarge, match="fewer prompts"):
        budget.spend(full_mask())


def test_mask_weighs_little_less_than_its_message():
    mask = full_mask(png=bytes(3000), bits=bytes(2000))
    size = build_response([ImageMasks(KEY, (1, 1), 0, ((mask,),))], Timings(), 10_000).ByteSize()
    assert 0 <= size - mask.size_bytes < 250


def test_formats_of_fixed_size_are_weighed_before_any_work():
    prompts = [pb.Prompt(points=[point()]), pb.Prompt(points=[point()])]
    message = request(*prompts, formats=[pb.MASK_FORMAT_BITS, pb.MASK_FORMAT_LOW_RES_LOGITS], selection=3)
    parsed = parse_request(message, LIMITS)
    exact = 6 * (131072 + 2)
    check_reply_can_fit(parsed, [(3, 5)], exact)
    with pytest.raises(ReplyTooLarge, match=f"{exact} bytes"):
        check_reply_can_fit(parsed, [(3, 5)], exact - 1)
