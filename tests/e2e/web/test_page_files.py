"""What goes into the page and what comes out: images, and files that other programs read."""

import base64
import io
import json
import zipfile
from urllib.parse import urlsplit

import numpy as np
import pytest
from e2e_support import iou
from PIL import Image
from pycocotools.coco import COCO

from splitsam.client.up import DEMO_PHOTO

# https://github.com/ppwwyyxx/cocoapi: pycocotools 2.0.11 lacks NumPy 2's copy keyword in one __array__.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
DROP = """([name, text]) => {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], `${name}.png`, { type: "image/png" }));
  const stage = document.getElementById("marks");
  const send = (kind, event) => stage.dispatchEvent(new event(kind, { bubbles: true, cancelable: true, ...carried }));
  const carried = { dataTransfer: transfer, clipboardData: transfer };
  if (name === "dropped") ["dragover", "drop"].forEach((kind) => send(kind, DragEvent));
  else send("paste", ClipboardEvent);
}"""


@pytest.fixture
def labeled(opened):
    """Three objects of two labels, one with a hole or a few."""
    opened.label("hen")
    opened.click(131, 410)
    opened.page.keyboard.press("n")
    opened.drag(372, 74, 566, 510)
    opened.page.keyboard.press("n")
    opened.label("hen in front")
    opened.click(840, 399)
    opened.click(608, 375, label=0)
    return opened


def saved(page, button, tmp_path):
    with page.page.expect_download() as download:
        page.page.click(button)
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    return path


def test_coco_files_are_read_by_pycocotools(labeled, tmp_path, photo_size):
    said = labeled.status.inner_text()
    path = saved(labeled, "#save-rle", tmp_path)
    labeled.says("Saved as demo.coco.json.")
    runs = COCO(path)
    [image] = runs.dataset["images"]
    assert (image["file_name"], image["width"], image["height"]) == ("demo.jpg", *photo_size)
    names = {category["id"]: category["name"] for category in runs.dataset["categories"]}
    entries = runs.loadAnns(runs.getAnnIds())
    assert [names[entry["category_id"]] for entry in entries] == ["hen", "hen", "hen in front"]
    assert f"{entries[2]['area']:,} pixels" in said
    polygons = COCO(saved(labeled, "#save-polygons", tmp_path))
    for entry, other in zip(entries, polygons.loadAnns(polygons.getAnnIds()), strict=True):
        mask = runs.annToMask(entry) > 0
        rows, columns = np.nonzero(mask)
        x, y, width, height = entry["bbox"]
        assert mask.sum() == entry["area"]
        assert (columns.min(), rows.min()) == (x, y)
        assert (columns.max() + 1, rows.max() + 1) == (x + width, y + height)
        assert isinstance(other["segmentation"], list)
        assert iou(polygons.annToMask(other) > 0, mask) > 0.95


def test_png_masks_are_the_same_masks(labeled, tmp_path, photo_size):
    path = saved(labeled, "#save-rle", tmp_path)
    annotations = COCO(path)
    masks = [annotations.annToMask(each) > 0 for each in annotations.loadAnns(annotations.getAnnIds())]
    with zipfile.ZipFile(saved(labeled, "#save-png", tmp_path)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["1-hen.png", "2-hen.png", "3-hen_in_front.png", "objects.png"]
        pictures = [Image.open(io.BytesIO(archive.read(name))) for name in archive.namelist()]
    for picture, mask in zip(pictures[:3], masks, strict=True):
        assert (picture.mode, picture.size) == ("L", photo_size)
        assert np.array_equal(np.asarray(picture), np.where(mask, 255, 0))
    numbers = np.zeros_like(masks[0], np.uint8)
    for number, mask in enumerate(masks, 1):
        numbers[mask] = number
    assert np.array_equal(np.asarray(pictures[3]), numbers)


@pytest.mark.parametrize("way", ["dropped", "pasted"])
def test_image_is_dropped_or_pasted(opened, other_image, way):
    content = base64.b64encode(other_image.read_bytes()).decode()
    opened.page.evaluate(DROP, [way, content])
    opened.says(f"{way}.png, 320 × 240")
    opened.size = (320, 240)
    opened.click(160, 120)


def test_image_that_was_opened_before_is_not_sent(browser, page_stack, other_image):
    with browser.open_page(page_stack.gateway) as page:
        sent = []
        page.page.on("request", lambda request: sent.append((request.method, urlsplit(request.url).path[:11])))
        for how in ("encoded in", "found in the cache in"):
            sent.clear()
            page.page.reload()
            page.open(other_image, (320, 240))
            page.says(how)
            assert (("POST", "/v1/images") in sent) == (how == "encoded in")


def test_file_that_is_no_image_is_said(opened, tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("no picture")
    opened.page.set_input_files("#file", path)
    opened.says("This file is no picture", "#problem")


def test_page_takes_nothing_from_elsewhere(browser, page_stack):
    with browser.open_page("about:blank") as page:
        hosts = []
        page.page.on("request", lambda request: hosts.append(urlsplit(request.url).netloc))
        page.page.goto(page_stack.gateway)
        page.page.set_input_files("#file", DEMO_PHOTO)
        page.says("demo.jpg, ")
        assert set(hosts) == {urlsplit(page_stack.gateway).netloc}


def test_labels_are_kept_for_the_next_image(opened):
    opened.label("cup")
    opened.page.reload()
    assert json.loads(opened.page.evaluate("() => localStorage.getItem('splitsam.labels')")) == ["object", "cup"]
    assert opened.page.locator("#labels input").count() == 2
