"""The hand-drawn evaluation set is whole, credited and drawn inside its pictures."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from training.photographs import PHOTOGRAPHS, load_photographs, rasterise

ENTRIES = json.loads((PHOTOGRAPHS / "masks.json").read_text(encoding="utf-8"))["photographs"]


def test_load_photographs_finds_at_least_10_with_30_masks():
    photographs = load_photographs()
    assert len(photographs) >= 10
    assert sum(len(photograph.masks) for photograph in photographs) >= 30


def test_load_photographs_returns_a_mask_and_a_name_per_object():
    for photograph, entry in zip(load_photographs(), ENTRIES, strict=True):
        assert photograph.image.dtype == np.uint8
        assert photograph.image.shape == (entry["height"], entry["width"], 3)
        assert photograph.mask_names == [item["name"] for item in entry["objects"]]
        for mask in photograph.masks:
            assert mask.dtype == np.bool_
            assert mask.shape == photograph.image.shape[:2]
            assert 0 < mask.sum() < mask.size


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["file"])
def test_photograph_is_credited_and_upright_and_its_rings_lie_inside(entry):
    for key in ("title", "author", "license", "source_package"):
        assert entry[key].strip()
    with Image.open(PHOTOGRAPHS / entry["file"]) as file:
        assert file.size == (entry["width"], entry["height"])
        assert not file.getexif()
    assert len({item["name"] for item in entry["objects"]}) == len(entry["objects"])
    for item in entry["objects"]:
        for ring in item["rings"]:
            assert len(ring) >= 3
            assert all(0 <= x <= entry["width"] - 1 and 0 <= y <= entry["height"] - 1 for x, y in ring)


def test_every_file_is_listed_once():
    listed = Counter(entry["file"] for entry in ENTRIES)
    assert set(listed.values()) == {1}
    assert set(listed) == {path.name for path in PHOTOGRAPHS.glob("*.jpg")}


def test_every_photograph_is_in_the_attribution():
    readme = (PHOTOGRAPHS / "README.md").read_text(encoding="utf-8")
    for entry in ENTRIES:
        row = next(line for line in readme.splitlines() if line.startswith(f"| {entry['file']} "))
        assert all(entry[key] in row for key in ("title", "author", "license", "source_package"))


def test_rasterise_leaves_a_hole_where_a_ring_lies_inside_another():
    mask = rasterise([[(2, 2), (17, 2), (17, 17), (2, 17)], [(6, 6), (13, 6), (13, 13), (6, 13)]], height=20, width=20)
    assert mask[4, 4]
    assert not mask[10, 10]
    assert not mask[0, 0]


def test_rasterise_takes_whole_numbers_for_the_centres_of_pixels():
    mask = rasterise([[(1, 1), (3, 1), (3, 2), (1, 2)]], height=4, width=5)
    assert np.argwhere(mask).tolist() == [[y, x] for y in (1, 2) for x in (1, 2, 3)]
