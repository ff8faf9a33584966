"""`splitsam export` against running services: boxes and points in, a COCO file that pycocotools reads out."""

import json
import signal
import subprocess
import warnings

import cv2
import numpy as np
import pytest
from e2e_support import COMMAND, decode_rle, draw, image_file, point, prompt, run_command, wait_until
from pycocotools.coco import COCO

NAMES = ("a.png", "b.png", "c.png")
BOXES = ([40, 30, 120, 90], [100, 60, 150, 120], [10.5, 20.25, 200, 180])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A folder of small images and the content of an annotation file with three boxes on each, images interleaved."""
    folder = tmp_path_factory.mktemp("dataset")
    for seed, name in enumerate(NAMES, start=900):
        (folder / name).write_bytes(image_file(draw(seed)))
    images = [{"id": 10 + i, "file_name": name, "width": 320, "height": 240} for i, name in enumerate(NAMES)]
    annotations = [
        {"id": 100 - 10 * i - j, "image_id": 10 + j, "category_id": 1, "bbox": box, "author": "somebody"}
        for i, box in enumerate(BOXES)
        for j in range(len(NAMES))
    ]
    return folder, {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}


def export(dataset, where, folder, *options, **changed):
    images, content = dataset
    (folder / "boxes.json").write_text(json.dumps({**content, **changed}))
    command = ("export", "boxes.json", "--out", "masks.json", "--root", images, *options, *where)
    return run_command(*command, folder=folder)


def read_coco(path):
    """What pycocotools makes of a file: annotations in its order, with their masks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # https://github.com/ppwwyyxx/cocoapi, as in e2e_support
        coco = COCO(str(path))
        return [(entry, coco.annToMask(entry).astype(bool)) for entry in coco.dataset["annotations"]]


def masks_of_clicks(alpha, folder, content):
    """What a person would get for each annotation's box, one request each."""
    keys = {image["id"]: alpha.encode((folder / image["file_name"]).read_bytes()) for image in content["images"]}
    masks = []
    for entry in content["annotations"]:
        x, y, width, height = entry["bbox"]
        asked = prompt(box=(x, y, x + width, y + height))
        [answer] = alpha.click(keys[entry["image_id"]].embedding.embedding_key, asked)
        masks.append(answer.masks[0])
    return masks


def test_boxes_become_the_masks_that_a_person_would_get(alpha, where, dataset, tmp_path):
    result = export(dataset, where, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("9 of 9 annotations have masks (")
    found = read_coco(tmp_path / "masks.json")
    expected = masks_of_clicks(alpha, *dataset)
    assert [entry["id"] for entry, _ in found] == [entry["id"] for entry in dataset[1]["annotations"]]
    for (entry, mask), given, click in zip(found, dataset[1]["annotations"], expected, strict=True):
        difference = np.count_nonzero(mask != decode_rle(click.rle))
        assert difference <= 2  # batches of other sizes round otherwise
        assert entry["area"] == mask.sum() > 0
        assert given.items() <= entry.items()
        assert entry["predicted_iou"] == pytest.approx(click.predicted_iou, abs=1e-3)
    assert {path.name for path in tmp_path.iterdir()} == {"boxes.json", "masks.json", "token"}


def filled(rings):
    """[height, width] bool: what rings of pixel centres go around."""
    canvas = np.zeros((240, 320), np.uint8)
    for ring in rings:
        cv2.drawContours(canvas, [np.array(ring).reshape(-1, 1, 2).astype(np.int32)], 0, 1, cv2.FILLED)
    return canvas.astype(bool)


def test_polygons_go_around_the_masks_of_points(alpha, where, dataset, tmp_path):
    folder, _ = dataset
    places = (80, 60), (160, 120)
    points = [{"id": i, "image_id": 10, "category_id": 1, "point_coords": [[x, y]]} for i, (x, y) in enumerate(places)]
    options = "--prompt", "point_coords", "--format", "polygons", "--tolerance", "0"
    result = export(dataset, where, tmp_path, *options, annotations=points)
    assert result.returncode == 0, result.stderr
    key = alpha.encode((folder / "a.png").read_bytes()).embedding.embedding_key
    found = read_coco(tmp_path / "masks.json")
    for (entry, mask), place in zip(found, places, strict=True):
        [answer] = alpha.click(key, prompt(point(*place)))
        clicked = decode_rle(answer.masks[0].rle)
        outlines, _ = cv2.findContours(clicked.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        whole = filled(ring for ring in outlines if cv2.contourArea(ring) > 0)
        assert np.count_nonzero(filled(entry["segmentation"]) != whole) <= 0.001 * whole.size
        assert 0 < mask.sum() <= whole.sum()
        assert entry["area"] == pytest.approx(clicked.sum(), abs=2)
        rows, columns = np.nonzero(clicked)
        corner = columns.min(), rows.min()
        assert entry["bbox"] == [*corner, columns.max() + 1 - corner[0], rows.max() + 1 - corner[1]]


def test_bad_entries_are_named_and_the_rest_is_exported(where, dataset, tmp_path):
    folder, content = dataset
    (folder / "bad.png").write_bytes(b"not an image")
    images = [
        *content["images"],
        {"id": 1, "file_name": "bad.png", "width": 4, "height": 4},
        {"id": 2, "file_name": "missing.png", "width": 4, "height": 4},
        {"id": 3, "file_name": "a.png", "width": 240, "height": 320},
    ]
    group = {"id": 500, "image_id": 10, "iscrowd": 1, "segmentation": {"size": [240, 320], "counts": [76800]}}
    wrong = [{"id": 200 + i, "image_id": i, "bbox": [0, 0, 3, 3]} for i in (1, 2, 3)]
    wrong.append({"id": 300, "image_id": 10, "bbox": [300, 0, 50, 3]})
    annotations = [content["annotations"][0], *wrong, group, content["annotations"][4]]
    options = "--report", tmp_path / "report.json"
    result = export(dataset, where, tmp_path, *options, images=images, annotations=annotations)
    assert result.returncode == 3, result.stderr
    assert result.stdout.startswith("2 of 7 annotations have masks (")
    written = json.loads((tmp_path / "masks.json").read_text())
    assert [entry["id"] for entry in written["annotations"]] == [100, 500, annotations[-1]["id"]]
    assert written["annotations"][1] == group
    assert (written["images"], written["categories"]) == (images, content["categories"])
    failures = {
        failure["image"].rpartition("/")[2]: failure["message"]
        for failure in json.loads((tmp_path / "report.json").read_text())["failures"]
    }
    assert failures["boxes.json"].startswith("annotations[4] (id 300).bbox: 350, 3 lies outside")
    assert failures["missing.png"] == "No such file or directory"
    assert failures["a.png"] == "is 320 x 240 pixels upright, but its width and height say 240 x 320"
    assert "image" in failures["bad.png"]
    assert sum(line.startswith("failed: ") for line in result.stderr.splitlines()) == 4


def test_an_interrupted_run_goes_on_where_it_was(alpha, where, dataset, tmp_path):
    folder, content = dataset
    for name in NAMES:
        alpha.encode((folder / name).read_bytes())
    first = content["annotations"]  # each box several times, so that there is time to interrupt
    annotations = [{**entry, "id": 1000 * i + entry["id"]} for i in range(6) for entry in first]
    (tmp_path / "boxes.json").write_text(json.dumps({**content, "annotations": annotations}))
    progress = tmp_path / "masks.json.progress"
    command = [COMMAND, "export", "boxes.json", "--out", "masks.json", "--root", folder, "--requests", "1", *where]
    running = subprocess.Popen([*map(str, command)], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: progress.exists() and progress.read_bytes().count(b"\n") >= 2, "an image is done")
        running.send_signal(signal.SIGINT)
        _, complaint = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130, complaint
    assert "the same command goes on from" in complaint
    done = progress.read_text().splitlines()
    assert len(done) - 1 < len(NAMES)
    progress.write_text("\n".join([*done[:2], '{"masks": [[0, nu']))
    result = export(dataset, where, tmp_path, annotations=annotations)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("54 of 54 annotations have masks (")
    assert result.stdout.endswith(", 18 of them had before\n")
    found = read_coco(tmp_path / "masks.json")
    assert [entry["id"] for entry, _ in found] == [entry["id"] for entry in annotations]
    assert not progress.exists()


def test_what_another_run_has_left_is_not_gone_on_with(where, dataset, tmp_path):
    journal = {"format": "splitsam.export/1", "settings": {"format": "polygons"}, "environment": {}}
    (tmp_path / "masks.json.progress").write_text(json.dumps(journal) + "\n")
    result = export(dataset, where, tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert "masks.json.progress: was begun with another " in result.stderr
