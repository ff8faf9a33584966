"""Which images `splitsam encode` takes, and how they are dealt out to shards."""

import json
from pathlib import Path

import pytest
import typer

from splitsam.client.image_list import ListedImage, Shard, find_images, parse_shard, read_coco, read_list, select_images

NAMES = [f"deep/{number:04}.jpg" for number in range(1000)]


def test_folders_are_searched_and_files_taken_as_they_are(tmp_path):
    for name in ("b.PNG", "a.jpg", "deep/c.webp", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    notes = tmp_path / "notes.txt"
    found = find_images([notes, tmp_path, tmp_path / "a.jpg", Path("missing.jpg")])
    assert [image.path.name for image in found] == ["notes.txt", "a.jpg", "b.PNG", "c.webp", "missing.jpg"]
    assert [image.name for image in found] == [notes.as_posix(), "a.jpg", "b.PNG", "deep/c.webp", "missing.jpg"]


def test_lists_are_relative_to_their_folder_or_to_another(tmp_path):
    listed, coco = tmp_path / "list.txt", tmp_path / "coco.json"
    listed.write_text("a.jpg\n\n  deep/b.jpg \na.jpg\n")
    coco.write_text(json.dumps({"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "deep/b.jpg"}]}))
    for root in (None, Path("elsewhere")):
        folder = root or tmp_path
        both = [ListedImage("a.jpg", folder / "a.jpg"), ListedImage("deep/b.jpg", folder / "deep/b.jpg")]
        assert read_list(listed, root) == both
        assert read_coco(coco, root) == both


@pytest.mark.parametrize("text", ["", "[]", '{"images": 1}', '{"images": [{"id": 1}]}', '{"images": ["a.jpg"]}'])
def test_what_is_no_coco_file_is_refused(tmp_path, text):
    path = tmp_path / "coco.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="file_name"):
        read_coco(path)


def test_every_image_is_in_one_shard_and_shards_are_alike():
    shards = [{name for name in NAMES if Shard(index, 7).holds(name)} for index in range(7)]
    assert sorted(name for shard in shards for name in shard) == NAMES
    assert all(110 < len(shard) < 180 for shard in shards)


def test_a_changed_listing_moves_nothing_else(tmp_path):
    before, after = tmp_path / "before.txt", tmp_path / "after.txt"
    before.write_text("\n".join(NAMES))
    after.write_text("\n".join(["0new.jpg", *reversed(NAMES[::2])]))

    def part(listed):
        images = select_images([], listed=listed, coco=None, root=None, shard=Shard(2, 5))
        return {image.name for image in images}

    assert part(after) - {"0new.jpg"} == part(before) & set(NAMES[::2])


def test_shards_stay_where_they_are_from_release_to_release():
    assert [name for name in NAMES[:20] if Shard(1, 4).holds(name)] == [
        "deep/0001.jpg",
        "deep/0003.jpg",
        "deep/0007.jpg",
        "deep/0018.jpg",
    ]


@pytest.mark.parametrize("text", ["", "1", "2/2", "-1/2", "1/0", "a/b", "1/2/3"])
def test_shards_of_another_form_are_refused(text):
    with pytest.raises(typer.BadParameter, match="--shard takes"):
        parse_shard(text)
    assert parse_shard("1/2") == Shard(1, 2)
