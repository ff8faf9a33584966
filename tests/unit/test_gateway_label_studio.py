"""Label Studio's configurations, prompts and regions."""

import numpy as np
import pytest

from splitsam.client.results import Mask, Polygon
from splitsam.gateway.brush import brush_rle
from splitsam.gateway.errors import GatewayError
from splitsam.gateway.label_config import Control, parse_config
from splitsam.gateway.label_prompts import read_drawn
from splitsam.gateway.label_regions import regions

CONFIG = """<View>
  <!-- a comment -->
  <Header value="Label it"/>
  <Image name="photo" value="$picture"/>
  <PolygonLabels name="outline" toName="photo"><Label value="Car"/><Label value="Tree" alias="tree"/></PolygonLabels>
  <BrushLabels name="paint" toName="photo"><Label value="Road"/></BrushLabels>
  <KeyPointLabels name="click" toName="photo"><Label value="Car"/><Label value="Road"/></KeyPointLabels>
</View>"""
PAINT, OUTLINE = Control("paint", "brush", ("Road",)), Control("outline", "polygon", ("Car", "tree"))


def keypoint(x, y, **more):
    return {"type": "keypointlabels", "value": {"x": x, "y": y, "width": 0.3, "keypointlabels": ["Car"]}, **more}


def rectangle(x, y, width, height, **more):
    value = {"x": x, "y": y, "width": width, "height": height, "rectanglelabels": ["Road"], **more}
    return {"type": "rectanglelabels", "value": value}


def decoded(rle):
    """The RGBA bytes of a brush, read bit by bit as the format says."""
    bits = "".join(f"{byte:08b}" for byte in rle)
    place = 0

    def read(count):
        nonlocal place
        place += count
        return int(bits[place - count : place], 2)

    size, value_bits = read(32), read(5) + 1
    run_sizes = [read(4) + 1 for _ in range(4)]
    values = []
    while len(values) < size:
        is_run, run = read(1), read(run_sizes[read(2)]) + 1
        values += [read(value_bits)] * run if is_run else [read(value_bits) for _ in range(run)]
    assert len(bits) - place < 8
    return np.array(values, np.uint8)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (37, 53), (1, 40_000), (300, 400)])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_brush_holds_the_mask_in_all_four_channels(shape, share):
    mask = np.random.default_rng(0).random(shape) < share
    values = decoded(brush_rle(mask)).reshape(*shape, 4)
    assert np.array_equal(values, np.repeat(mask[..., None], 4, axis=2) * np.uint8(255))


def test_brush_of_label_studios_own_encoder_is_the_same():
    """What `label_studio_sdk.converter.brush.mask2rle` (2.1.2) makes of this mask."""
    mask = np.zeros((3, 4), bool)
    mask[1, 1:3] = True
    assert brush_rle(mask) == [0, 0, 0, 48, 57, 27, 254, 19, 0, 159, 255, 9, 128, 0]


def test_configuration_is_read():
    config = parse_config(CONFIG)
    assert (config.image_name, config.data_key) == ("photo", "picture")
    assert config.controls == [PAINT, OUTLINE]


@pytest.mark.parametrize(("label", "control"), [("Road", PAINT), ("Car", OUTLINE), ("tree", OUTLINE), (None, PAINT)])
def test_control_is_the_one_with_the_label(label, control):
    assert parse_config(CONFIG).control_for(label) == control


def test_control_without_labels_takes_any():
    config = parse_config('<View><Image name="i" value="$i"/><Brush name="b" toName="i"/></View>')
    assert config.control_for("Car") == Control("b", "brush", None)


def test_label_that_no_control_has_is_said():
    with pytest.raises(GatewayError, match="'Sky'"):
        parse_config(CONFIG).control_for("Sky")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("", "cannot be read"),
        ("<View>", "cannot be read"),
        ("<View/>", "no Image"),
        ('<View><Text name="t" value="$t"/></View>', "no Image"),
        ('<View><Image name="i" value="http://h/x.jpg"/></View>', "no Image"),
        ('<View><Image name="i" valueList="$i"/></View>', "no Image"),
        ('<View><Image name="i" value="$i"/><RectangleLabels name="r" toName="i"/></View>', "add BrushLabels"),
        ('<View><Image name="i" value="$i"/><BrushLabels name="b" toName="other"/></View>', "add BrushLabels"),
        ('<!DOCTYPE v [<!ENTITY a "aaaa">]><View>&a;</View>', "not read here"),
    ],
)
def test_configuration_that_is_of_no_use_is_said(config, said):
    with pytest.raises(GatewayError, match=said) as caught:
        parse_config(config)
    assert caught.value.reason == "LABEL_CONFIG_UNUSABLE"


def test_clicks_and_a_rectangle_are_one_prompt_in_pixels():
    drawn = read_drawn([keypoint(50, 25), keypoint(0, 100, is_positive=False), rectangle(10, 20, 30, 40)])
    prompt = drawn.prompt(200, 400)
    assert prompt.points == [(100, 100), (0, 400)]
    assert prompt.labels == [1, 0]
    assert prompt.box == pytest.approx((20, 80, 80, 240))
    assert drawn.label == "Road"


@pytest.mark.parametrize(
    "item", [keypoint(1, 1, is_positive=0), keypoint(1, 1) | {"value": {"x": 1, "y": 1, "positive": False}}]
)
def test_negative_click_is_told_in_either_place(item):
    assert read_drawn([item]).prompt(100, 100).labels == [0]


def test_rectangle_reaching_over_the_edge_is_cut_off():
    assert read_drawn([rectangle(90, 90, 20, 20)]).prompt(100, 50).box == pytest.approx((90, 45, 100, 50))


def test_turned_rectangle_becomes_the_box_around_it():
    prompt = read_drawn([rectangle(50, 10, 20, 10, rotation=90)]).prompt(100, 100)
    assert prompt.box == pytest.approx((40, 10, 50, 30))


def test_what_is_no_prompt_is_passed_over():
    brush = {"type": "brushlabels", "value": {"rle": [1]}}
    assert read_drawn([brush, {"type": "choices"}, {"value": 3}, {}]) is None


@pytest.mark.parametrize(
    ("item", "said"),
    [
        (keypoint(101, 5), "x is 101 %"),
        (keypoint(5, -0.5), "y is -0.5 %"),
        (rectangle(0, 0, 180, 10), "width is 180 %"),
        (keypoint(float("nan"), 5), "no number for x"),
        (keypoint(None, 5), "no number for x"),
        (keypoint("5", 5), "no number for x"),
        (keypoint(True, 5), "no number for x"),
        (rectangle(0, 0, 10, None), "no number for height"),
    ],
)
def test_what_lies_outside_of_the_image_is_said(item, said):
    with pytest.raises(GatewayError, match=said) as caught:
        read_drawn([item])
    assert caught.value.reason == "PROMPT_UNUSABLE"


def mask_of(pixels, polygons=()):
    height, width = pixels.shape
    bits = np.packbits(pixels.ravel(), bitorder="little").tobytes()
    box = (0.0, 0.0, 1.0, 1.0) if pixels.any() else None
    return Mask(2, 0.75, 0.5, int(pixels.sum()), box, width, height, bits=bits, polygons=polygons)


def test_brush_region_names_its_tag_and_its_label():
    pixels = np.random.default_rng(1).random((6, 9)) < 0.5
    [region] = regions(mask_of(pixels), PAINT, "photo", "Road")
    assert (region["from_name"], region["to_name"], region["type"]) == ("paint", "photo", "brushlabels")
    assert (region["original_width"], region["original_height"], region["image_rotation"]) == (9, 6, 0)
    assert (region["score"], region["value"]["brushlabels"], region["value"]["format"]) == (0.75, ["Road"], "rle")
    assert np.array_equal(decoded(region["value"]["rle"]).reshape(6, 9, 4)[..., 3] > 0, pixels)


def test_every_piece_is_a_polygon_in_percent():
    square = np.array([(0, 0), (9, 0), (9, 4), (0, 4)], np.float32)
    line = np.array([(0, 0), (1, 1)], np.float32)
    pixels = np.ones((5, 10), bool)
    found = regions(mask_of(pixels, (Polygon(square, (line,)), Polygon(line, ()))), OUTLINE, "photo", "Car")
    assert [region["type"] for region in found] == ["polygonlabels"]
    assert found[0]["value"]["points"] == [[5, 10], [95, 10], [95, 90], [5, 90]]
    assert found[0]["value"]["polygonlabels"] == ["Car"]
    assert found[0]["value"]["closed"]


def test_empty_mask_has_no_region():
    assert regions(mask_of(np.zeros((4, 4), bool)), PAINT, "photo", "Road") == []


def test_region_of_a_tag_without_labels_has_none():
    [region] = regions(mask_of(np.ones((4, 4), bool)), Control("b", "brush", None), "photo", "Car")
    assert region["type"] == "brush"
    assert region["value"].keys() == {"format", "rle"}
