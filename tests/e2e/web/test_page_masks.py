"""Masks on the page are those of the services: under the mouse, after clicks, after undo."""

import json

import cv2
import numpy as np
import pytest

from splitsam.client.up import DEMO_PHOTO

HEN, HEAD, BOX = (131, 410), (127, 189), (372, 74, 566, 510)
CHANGED = 12  # of 255; what is not painted over stays as it is, to the last bit


@pytest.fixture(scope="module")
def photo_key(services):
    return services.encode(DEMO_PHOTO).key


def painted(page, before, after, mask):
    """The shares of pixels well inside and well outside a mask that are other than before."""
    (left, top), (right, bottom) = page.place(0, 0), page.place(*page.size)
    kernel = np.ones((15, 15), np.uint8)
    inside = cv2.erode(mask.astype(np.uint8), kernel) > 0
    outside = cv2.dilate(mask.astype(np.uint8), kernel) == 0
    difference = np.abs(after.astype(int) - before.astype(int)).max(2)
    shares = []
    for part in (inside, outside):
        rows, columns = np.nonzero(part)
        at = np.random.default_rng(0).choice(len(rows), 2000)
        x = left + (right - left) * (columns[at] + 0.5) / page.size[0]
        y = top + (bottom - top) * (rows[at] + 0.5) / page.size[1]
        shares.append(np.mean(difference[y.astype(int), x.astype(int)] > CHANGED))
    return shares


def test_mask_is_painted_under_the_mouse_before_any_click(opened, services, photo_key):
    before = opened.pixels()
    opened.hover(100, 300)
    opened.hover(*HEN)
    opened.says("Preview", "#timing")
    opened.page.wait_for_timeout(1000)  # the answer to the second position may have come after the first one's
    [expected] = services.predict(photo_key, points=[HEN])
    inside, outside = painted(opened, before, opened.pixels(), expected.to_array())
    assert (inside, outside) == (pytest.approx(1, abs=0.02), pytest.approx(0, abs=0.02))
    opened.page.mouse.move(1100, 700)
    opened.page.wait_for_timeout(300)
    assert np.array_equal(opened.pixels(), before)


def test_clicks_refine_and_undo_brings_back_what_was(opened, services, photo_key):
    before = opened.pixels()
    asked = []
    opened.page.on("request", lambda sent: sent.url.endswith("/v1/masks") and asked.append(json.loads(sent.post_data)))
    opened.click(*HEN)
    [first] = services.predict(photo_key, points=[HEN], refinement_tokens=True)
    opened.says(f"Object 1, object: {first.area_px:,} pixels")
    one_click = opened.pixels()
    inside, outside = painted(opened, before, one_click, first.to_array())
    assert (inside, outside) == (pytest.approx(1, abs=0.02), pytest.approx(0, abs=0.02))

    opened.click(*HEAD, label=0)
    points = {"points": asked[1]["points"], "labels": asked[1]["labels"]}
    assert (np.abs(np.array(points["points"]) - (HEN, HEAD)).max() < 1, points["labels"]) == (True, [1, 0])
    assert asked[1]["refinement_token"]
    [refined] = services.predict(photo_key, **points, mask_input=first.refinement_token)
    opened.says(f"{refined.area_px:,} pixels")
    assert not np.array_equal(opened.pixels(), one_click)

    opened.page.keyboard.press("Control+z")
    opened.page.wait_for_timeout(300)
    assert np.array_equal(opened.pixels(), one_click)
    opened.page.click("#undo")
    assert opened.page.locator("#objects li").count() == 0
    opened.page.click("#redo")
    opened.page.keyboard.press("Control+y")
    assert opened.page.locator("#objects li").count() == 1
    assert len(asked) == 2  # undo and redo ask nobody


def test_box_is_drawn_by_dragging(opened, services, photo_key):
    opened.drag(*BOX)
    asked = opened.page.locator("#status").inner_text()
    [expected] = services.predict(photo_key, box=BOX)
    area = int(asked.split(": ")[1].split(" ")[0].replace(",", ""))
    assert area == pytest.approx(expected.area_px, rel=0.03)  # a box is drawn to the pixel of the screen


def test_box_that_was_thought_better_of_asks_nobody(opened):
    before = opened.pixels()
    opened.hover(372, 74)
    opened.page.mouse.down()
    opened.page.mouse.move(*opened.place(566, 510), steps=4)
    assert not np.array_equal(opened.pixels(), before)
    opened.page.keyboard.press("Escape")
    opened.page.keyboard.press("p")
    opened.page.mouse.up()
    opened.page.wait_for_timeout(300)
    assert np.array_equal(opened.pixels(), before)
    assert opened.page.locator("#objects li").count() == 0


def test_run_lengths_are_read_as_pycocotools_reads_them(opened, services, photo_key):
    script = "async ([rle, box]) => [...(await import('/assets/rle.js')).drawRuns(rle, box, 1)]"
    masks = services.predict(photo_key, points=[HEAD], selection="all")
    for mask in [*masks, *services.predict(photo_key, box=BOX)]:
        x0, y0, x1, y1 = map(int, mask.box)
        drawn = opened.page.evaluate(script, [mask.rle, [x0, y0, x1, y1]])
        assert np.array_equal(np.array(drawn).reshape(y1 - y0, x1 - x0) > 0, mask.to_array()[y0:y1, x0:x1])


def test_fast_mouse_never_queues(browser, page_stack, photo_size):
    """Each position is answered, with a mask or by the newer one that took its place, and the last one with a mask."""
    with browser.open_page("about:blank") as page:
        sent, answered = [], []

        def follow(socket):
            socket.on("framesent", lambda frame: sent.append(json.loads(frame)))
            socket.on("framereceived", lambda frame: answered.append(json.loads(frame)))

        page.page.on("websocket", follow)
        page.page.goto(page_stack.gateway)
        page.open(DEMO_PHOTO, photo_size)
        page.hover(50, 50)
        page.page.mouse.move(*page.place(900, 600), steps=150)
        page.says("Preview", "#timing")
        for _ in range(600):
            if len(answered) == len(sent) - 1:  # the first one names the image
                break
            page.page.wait_for_timeout(50)
        ids = [position["id"] for position in sent[1:]]
        assert sorted(answer["id"] for answer in answered) == ids
        assert sum("superseded_by" in answer for answer in answered) > 0
        assert "masks" in next(answer for answer in answered if answer["id"] == ids[-1])
        assert np.abs(np.array(sent[-1]["points"][0]) - (900, 600)).max() < 1
        page.check_problems()
