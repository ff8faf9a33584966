"""Which annotations of a COCO file can be asked about, and what is said of the others."""

import copy
from pathlib import Path

import pytest

from splitsam.client.export_plan import make_plan

IMAGE = {"id": 1, "file_name": "a.png", "width": 100, "height": 80}
BOX = {"id": 7, "image_id": 1, "bbox": [10, 20, 30, 40]}


def plan(annotations, fields=("bbox",), images=(IMAGE,), max_points=4):
    content = {"images": copy.deepcopy(list(images)), "annotations": copy.deepcopy(list(annotations))}
    return make_plan(content, Path("/images"), "file.json", fields, max_points=max_points)


def prompts_of(annotation, *fields):
    [image] = plan([annotation], fields).images
    [task] = image.tasks
    return task.prompt


def test_a_box_becomes_its_edges_and_keeps_the_annotations_place():
    found = plan([{"id": "x", "image_id": 9}, BOX])
    [image] = found.images
    [task] = image.tasks
    assert (image.path, image.size) == (Path("/images/a.png"), (100, 80))
    assert (task.index, task.place, task.prompt.box) == (1, "annotations[1] (id 7)", (10, 20, 40, 60))
    assert found.annotations == 2


def test_edges_that_rounding_put_outside_are_moved_to_the_image():
    assert prompts_of({**BOX, "bbox": [-0.5, 0, 101, 80.9]}, "bbox").box == (0, 0, 100, 80)


def test_points_and_labelled_keypoints_make_one_prompt_with_the_box():
    annotation = {
        **BOX,
        "point_coords": [[1, 2], [3, 4]],
        "point_labels": [1, 0],
        "keypoints": [5, 6, 2, 0, 0, 0, 7, 8, 1],
    }
    prompt = prompts_of(annotation, "bbox", "point_coords", "keypoints")
    assert prompt.points == [(1, 2), (3, 4), (5, 6), (7, 8)]
    assert prompt.labels == [1, 0, 1, 1]
    assert prompt.box == (10, 20, 40, 60)
    assert prompts_of(annotation, "keypoints").box is None


def test_groups_are_told_apart_and_images_without_tasks_left_out():
    found = plan([{**BOX, "iscrowd": 1}])
    assert (found.images, found.crowds, found.failures) == ((), (0,), ())


BAD = {
    "no object": ([], "annotations[0]: must be an object"),
    "no id": ({"image_id": 1, "bbox": [1, 1, 2, 2]}, "annotations[0].id: is missing"),
    "no image": ({**BOX, "image_id": 2}, "annotations[0].image_id: 2 is the id of no usable image"),
    "no prompt": ({"id": 7, "image_id": 1}, "annotations[0] (id 7): has no bbox to make a prompt of"),
    "three numbers": ({**BOX, "bbox": [1, 2, 3]}, "annotations[0] (id 7).bbox: must be four numbers"),
    "not finite": ({**BOX, "bbox": [1, 2, 3, float("nan")]}, "annotations[0] (id 7).bbox: must be four numbers"),
    "no area": ({**BOX, "bbox": [1, 2, 0, 3]}, "annotations[0] (id 7).bbox: width and height must be above 0"),
    "outside": ({**BOX, "bbox": [90, 2, 20, 3]}, "(id 7).bbox: 110, 5 lies outside of the image of 100 x 80"),
    "at the edge": ({**BOX, "bbox": [100, 2, 0.5, 3]}, "(id 7).bbox: lies outside of the image"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_annotation_is_named_with_id_and_field(case):
    annotation, complaint = BAD[case]
    found = plan([annotation, {**BOX, "id": 8}])
    [failure] = found.failures
    assert complaint in failure.message
    assert (failure.image, failure.is_final) == ("file.json", True)
    assert [task.index for task in found.images[0].tasks] == [1]


BAD_POINTS = {
    "coords": ({"point_coords": [[1, 2, 3]]}, ".point_coords: must be a list of points"),
    "labels": ({"point_coords": [[1, 2]], "point_labels": [2]}, ".point_labels: must be 1 labels"),
    "keypoints": ({"keypoints": [1, 2]}, ".keypoints: must be three numbers a point"),
    "outside": ({"keypoints": [1, 200, 2]}, ".keypoints: 1, 200 lies outside"),
    "hidden": ({"keypoints": [0, 0, 0]}, ": has no point_coords and no keypoints"),
    "many": ({"point_coords": [[1, 1]] * 5}, ": has 5 points; at most 4 are allowed"),
}


@pytest.mark.parametrize("case", BAD_POINTS)
def test_bad_points_are_named(case):
    annotation, complaint = BAD_POINTS[case]
    [failure] = plan([{"id": 7, "image_id": 1, **annotation}], ("point_coords", "keypoints")).failures
    assert f"annotations[0] (id 7){complaint}" in failure.message


def test_ids_that_come_twice_are_named():
    found = plan([BOX, BOX], images=(IMAGE, IMAGE))
    assert [failure.message for failure in found.failures] == [
        "images[1].id: 1 is the id of an earlier image too",
        "annotations[1].id: 7 is the id of an earlier annotation too",
    ]
