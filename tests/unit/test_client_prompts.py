"""Prompts and options on the wire."""

import numpy as np
import pytest

from splitsam.client.prompts import GridOptions, Prompt, everything_message, output_message
from splitsam.client.results import Mask
from splitsam.v1 import decoder_pb2 as pb


def mask_with(**fields):
    return Mask(index=0, score=0, stability=0, area_px=0, box=None, width_px=8, height_px=8, **fields)


def test_points_are_foreground_unless_labelled():
    message = Prompt([(1, 2), (3.5, 4)]).to_message()
    assert [(p.x, p.y, p.label) for p in message.points] == [
        (1, 2, pb.POINT_LABEL_FOREGROUND),
        (3.5, 4, pb.POINT_LABEL_FOREGROUND),
    ]


@pytest.mark.parametrize("labels", [[1, 0], [True, False], np.array([1, 0]), np.array([1.0, 0.0])])
def test_labels_map_sams_zero_and_one(labels):
    message = Prompt(np.array([[1, 2], [3, 4]], np.float32), labels).to_message()
    assert [p.label for p in message.points] == [pb.POINT_LABEL_FOREGROUND, pb.POINT_LABEL_BACKGROUND]


@pytest.mark.parametrize("label", [-1, 2, 0.5])
def test_other_labels_are_refused(label):
    with pytest.raises(ValueError, match="label is 1"):
        Prompt([(1, 2)], [label]).to_message()


def test_points_and_labels_must_match_in_number():
    with pytest.raises(ValueError, match="2 points need as many labels, not 1"):
        Prompt([(1, 2), (3, 4)], [1]).to_message()


def test_box_is_set_only_when_given():
    assert not Prompt([(1, 2)]).to_message().HasField("box")
    box = Prompt(box=np.array([1, 2, 3, 4.5])).to_message().box
    assert (box.x0, box.y0, box.x1, box.y1) == (1, 2, 3, 4.5)


def test_mask_input_prefers_the_token_of_a_mask():
    message = Prompt([(1, 2)], mask_input=mask_with(refinement_token="t", low_res_logits=b"l")).to_message()
    assert message.WhichOneof("mask_input") == "refinement_token"


def test_mask_input_takes_the_logits_of_a_mask_without_token():
    message = Prompt([(1, 2)], mask_input=mask_with(low_res_logits=b"l")).to_message()
    assert message.low_res_logits == b"l"


def test_mask_input_of_a_mask_with_neither_says_what_to_ask_for():
    with pytest.raises(ValueError, match="refinement_tokens=True"):
        Prompt([(1, 2)], mask_input=mask_with()).to_message()


def test_mask_input_array_is_sent_as_little_endian_fp16():
    logits = np.linspace(-5, 5, 256 * 256, dtype=np.float32).reshape(1, 256, 256)
    sent = Prompt(mask_input=logits).to_message().low_res_logits
    np.testing.assert_array_equal(np.frombuffer(sent, "<f2"), logits.reshape(-1).astype(np.float16))


def test_mask_input_array_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\[256, 256\], not \[3, 3\]"):
        Prompt(mask_input=np.zeros((3, 3))).to_message()


def test_without_token_keeps_points_and_drops_the_token():
    replayed = Prompt([(1, 2)], mask_input="token").without_token().to_message()
    assert len(replayed.points) == 1
    assert replayed.WhichOneof("mask_input") is None


def test_without_token_sends_the_logits_a_mask_carries():
    prompt = Prompt(mask_input=mask_with(refinement_token="t", low_res_logits=b"l"))
    assert prompt.without_token().to_message().low_res_logits == b"l"


def test_without_token_is_none_when_nothing_would_be_left():
    assert Prompt(mask_input="token").without_token() is None
    assert Prompt(mask_input=mask_with(refinement_token="t")).without_token() is None


def test_without_token_leaves_other_prompts_alone():
    prompt = Prompt([(1, 2)], mask_input=b"logits")
    assert prompt.without_token() is prompt


def test_output_defaults_are_rle_and_automatic_selection():
    message = output_message({})
    assert list(message.formats) == [pb.MASK_FORMAT_RLE]
    assert message.selection == pb.MASK_SELECTION_UNSPECIFIED
    assert not message.HasField("polygon_tolerance_px")


def test_output_options_reach_the_wire():
    message = output_message(
        {
            "selection": "all",
            "formats": ("png", "polygons"),
            "polygon_tolerance_px": 0.0,
            "refinement_tokens": True,
            "mask_threshold": 0.5,
        }
    )
    assert message == pb.OutputOptions(
        formats=[pb.MASK_FORMAT_PNG, pb.MASK_FORMAT_POLYGONS],
        selection=pb.MASK_SELECTION_ALL,
        polygon_tolerance_px=0.0,
        refinement_tokens=True,
        mask_threshold=0.5,
    )


@pytest.mark.parametrize("options", [{"selection": "most"}, {"formats": ["jpeg"]}])
def test_unknown_option_values_list_the_known(options):
    with pytest.raises(ValueError, match="one of"):
        output_message(options)


def test_every_knob_of_everything_mode_reaches_the_wire():
    grids = {"point_grid": [(0.25, 0.5)], "crop_point_grids": [np.array([(0.5, 0.75), (0.5, 0.25)])]}
    numbers = {
        name: 1
        for name in GridOptions.__annotations__
        if name not in ("point_grid", "crop_point_grids", "points_per_side")
    }
    message = everything_message(b"a file", {**grids, **numbers}, output_message({}))
    assert (message.image, message.WhichOneof("source")) == (b"a file", "image")
    assert list(message.point_grid) == [0.25, 0.5]
    assert [list(grid.xy) for grid in message.crop_point_grids] == [[0.5, 0.75, 0.5, 0.25]]
    assert all(message.HasField(name) and getattr(message, name) == 1 for name in numbers)
    assert everything_message("ab", {"points_per_side": 3}, output_message({})).embedding_key == "ab"


@pytest.mark.parametrize("grid", [{"points_per_side": "many"}, {"crop_layers": 1.5}, {"point_grid": [("a", "b")]}])
def test_knob_of_the_wrong_type_is_refused(grid):
    with pytest.raises(ValueError, match="wrong type"):
        everything_message("ab", grid, output_message({}))
