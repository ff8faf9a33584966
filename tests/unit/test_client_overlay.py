"""Overlays show masks, prompts and a legend, and leave the rest of the photo alone."""

import io

import numpy as np
import pytest
from PIL import Image

from splitsam.client.overlay import BACKGROUND, FOREGROUND, PALETTE, Layer, draw_overlay, open_upright

GREY = 90


@pytest.fixture
def photo():
    return Image.new("RGB", (400, 300), (GREY,) * 3)


def square(x0, y0, x1, y1, size=(300, 400)):
    mask = np.zeros(size, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def test_mask_is_tinted_and_the_rest_is_untouched(photo):
    drawn = np.asarray(draw_overlay(photo, [Layer(square(100, 100, 200, 200))]))
    expected = np.array(PALETTE[0]) * 0.45 + GREY * 0.55
    np.testing.assert_allclose(drawn[150, 150], expected, atol=1)
    assert (drawn[20:80] == GREY).all()
    assert (drawn[:, 300:] == GREY).all()


def test_layers_have_different_colours(photo):
    drawn = np.asarray(draw_overlay(photo, [Layer(square(10, 10, 60, 60)), Layer(square(200, 10, 260, 60))]))
    assert tuple(drawn[35, 35]) != tuple(drawn[35, 230])


def test_many_layers_have_as_many_colours(photo):
    layers = [Layer(square(20 * i % 400, 60 * (i // 20), 20 * i % 400 + 20, 60 * (i // 20) + 20)) for i in range(60)]
    drawn = np.asarray(draw_overlay(photo, layers))
    colours = {tuple(drawn[60 * (i // 20) + 10, 20 * i % 400 + 10]) for i in range(60)}
    assert len(colours) == 60


def test_holes_stay_clear(photo):
    mask = square(50, 50, 250, 250)
    mask[120:180, 120:180] = False
    assert (np.asarray(draw_overlay(photo, [Layer(mask)]))[150, 150] == GREY).all()


def test_points_are_green_or_red(photo):
    layer = Layer(square(0, 0, 1, 1), points=[(100, 100), (200, 100)], labels=[1, 0])
    drawn = np.asarray(draw_overlay(photo, [layer]))
    assert tuple(drawn[96, 96]) == FOREGROUND
    assert tuple(drawn[96, 196]) == BACKGROUND


def test_legend_is_below_the_photo(photo):
    drawn = draw_overlay(photo, [Layer(square(10, 10, 60, 60), "a click")])
    assert drawn.width == 400
    assert drawn.height > 300


def test_empty_mask_and_prompts_outside_draw_without_error(photo):
    layer = Layer(np.zeros((300, 400), bool), "nothing", points=[(-5, 900)], box=(-10, -10, 900, 900))
    assert draw_overlay(photo, [layer]).width == 400


def test_open_upright_undoes_orientation():
    stored = Image.new("RGB", (30, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    stored.save(file, "JPEG", exif=exif)
    assert open_upright(file.getvalue()).size == (20, 30)
