"""The accuracy experiment measures what it says, goes on where it stopped, and names what it cannot use."""

import json
import shutil

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from bench.coco import __main__ as coco
from bench.coco import drawn as drawn_coco
from bench.coco import experiment as coco_experiment
from bench.coco.dataset import draw_mask, load_image, read_dataset
from bench.coco.rows import Row, RowFile
from bench.coco.scores import Score, find_centre_point, measure_iou
from bench.coco.table import summarise
from splitsam.client.coco_file import DatasetError
from splitsam.client.journal import JournalError
from splitsam.common.checkpoints import load_model
from splitsam.common.rle import decode_rle
from training.evaluate import Example
from training.objects import choose_targets
from training.pool import HELD, Families, draw_procedural
from training.scenes import draw_scenes

SIDE_PX = 256
SQUARE = [[2, 1, 6, 1, 6, 4, 2, 4]]
SQUARE_RUNS = [17, 3, 5, 3, 5, 3, 5, 3, 36]


@pytest.fixture(scope="module")
def examples():
    """Two small scenes from the project's generator; training.evaluate's own are 1024 px and take ten seconds each."""
    rng = np.random.default_rng(5)
    materials = draw_procedural(Families(HELD.shapes, HELD.textures, each=2), rng, torch.device("cpu"))
    scenes = draw_scenes(materials, 2, SIDE_PX, rng)
    targets = choose_targets(scenes, 2, torch.Generator().manual_seed(0), parts=False)
    examples = []
    for i in range(2):
        height, width = int(scenes.valid[i, 0].any(1).sum()), int(scenes.valid[i, 0].any(0).sum())
        image = scenes.images[i, :, :height, :width].round().byte().permute(1, 2, 0).numpy()
        examples.append(Example(f"scene{i}", image, targets.masks[i, targets.weight[i] > 0, :height, :width].numpy()))
    return examples


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    """vit_t with one of its eight blocks: the experiment around it is the same, and ten times faster."""

    def load_shallow(**arguments):
        model = load_model(**arguments)
        model.sam.image_encoder.blocks = model.sam.image_encoder.blocks[:1]
        return model

    monkeypatch.setattr(coco, "load_model", load_shallow)


@pytest.fixture
def drawn(examples, tmp_path):
    """The dataset's folder."""
    drawn_coco.write_dataset(tmp_path / "drawn", examples)
    return tmp_path / "drawn"


def change(folder, edit):
    """Edit the annotations in place."""
    path = folder / "instances.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def read(folder):
    return read_dataset(folder / "instances.json", folder / "images")


def run(folder, *words):
    options = ["--annotations", str(folder / "instances.json"), "--images", str(folder / "images"), "--device", "cpu"]
    return coco.main([*options, "--results", str(folder / "results.jsonl"), *words])


def read_rows(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()[1:]]


def walk(mask, x, y, step_x, step_y):
    steps = 0
    while True:
        x, y = x + step_x, y + step_y
        if not (0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x]):
            return steps
        steps += 1


def score(area_px=1.0, **changes):
    figures = {"index": 1, "flipped": False, "own_choice": 1.0, "fp32_choice": 1.0, "oracle": 1.0, "vs_fp32": 1.0}
    return Score(annotation=1, area_px=area_px, **{**figures, **changes})


def test_drawn_set_holds_the_masks_of_the_generator(drawn, examples):
    for image, example in zip(read(drawn).images, examples, strict=True):
        loaded = load_image(image)
        assert (loaded.masks == example.masks).all()
        assert loaded.left_out == ()
    annotations = json.loads((drawn / "instances.json").read_text())["annotations"]
    for annotation, mask in zip(annotations, (mask for example in examples for mask in example.masks), strict=True):
        assert annotation["area"] == mask.sum()
        assert annotation["bbox"] == coco_mask.toBbox(annotation["segmentation"]).tolist()


def test_drawn_set_says_in_one_line_that_its_folder_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"error: .*: Not a directory"):
        drawn_coco.main(["--output", str(tmp_path / "file"), "--scenes", "1"])


def test_find_centre_point_is_the_centroid_where_the_mask_covers_it():
    mask = np.zeros((30, 40), bool)
    mask[10:21, 4:9] = True
    assert find_centre_point(mask) == (6, 15)


@pytest.mark.parametrize("seed", range(8))
def test_find_centre_point_of_a_mask_around_its_centroid_is_far_from_four_edges(seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((24, 30)) < 0.8
    rows, columns = np.nonzero(mask)
    mask[round(rows.mean()), round(columns.mean())] = False
    rows, columns = np.nonzero(mask)
    best, expected = -1, None
    for y, x in zip(rows.tolist(), columns.tolist(), strict=True):
        depth = min(walk(mask, x, y, *step) for step in ((0, -1), (1, 0), (0, 1), (-1, 0)))
        if depth > best:
            best, expected = depth, (x, y)
    assert find_centre_point(mask) == expected


def test_find_centre_point_takes_the_first_point_20_px_from_the_edges():
    mask = np.zeros((200, 200), bool)
    mask[:60] = mask[140:] = True
    mask[:, :10] = True
    assert find_centre_point(mask) == (20, 20)


def test_measure_iou_of_two_empty_masks_is_1():
    empty = np.zeros((3, 3), bool)
    assert measure_iou(empty, empty) == 1.0
    assert measure_iou(empty, ~empty) == 0.0


def test_draw_mask_of_polygons_and_of_both_run_length_encodings_agree():
    size = (8, 10)
    runs = {"size": [8, 10], "counts": SQUARE_RUNS}
    compressed = coco_mask.frPyObjects(runs, *size)["counts"].decode()
    mask = draw_mask(runs, size)
    assert mask.sum() == 12
    assert mask[1:4, 2:6].all()
    assert (draw_mask({"size": [8, 10], "counts": compressed}, size) == mask).all()
    assert (draw_mask(SQUARE, size) == mask).all()


def test_draw_mask_joins_polygons():
    other = [[7, 5, 9, 5, 9, 7, 7, 7]]
    joined = draw_mask([*SQUARE, *other], (8, 10))
    assert (joined == (draw_mask(SQUARE, (8, 10)) | draw_mask(other, (8, 10)))).all()


@pytest.mark.parametrize(
    ("segmentation", "complaint"),
    [
        (None, "list of polygons or a run-length encoding"),
        ([], "has no polygon"),
        ([[1, 2, 3, 4]], "polygon 0 must be an even number of coordinates"),
        ([SQUARE[0], [1, 2, 3, 4, 5, 6, 7]], "polygon 1 must be an even number"),
        ([[1, 2, 3, 4, 5, "6"]], "polygon 0 has a coordinate"),
        ([[1, 2, 3, 4, 5, float("nan")]], "polygon 0 has a coordinate"),
        ([[0, 0, 1e9, 0, 1e9, 1e9]], "polygon 0 has a coordinate"),
        ([[-5, -5, -2, -5, -2, -2]], "covers no pixel"),
        ({"counts": [80]}, "size must be [8, 10]"),
        ({"size": [10, 8], "counts": [80]}, "size must be [8, 10]"),
        ({"size": [8, 10]}, "counts must be a string or whole numbers"),
        ({"size": [8, 10], "counts": [90, -10]}, "counts must be a string or whole numbers"),
        ({"size": [8, 10], "counts": [3, 4]}, "counts fill 7 pixels of 8 x 10"),
        ({"size": [8, 10], "counts": "zz"}, "counts cannot be decoded"),
        ({"size": [8, 10], "counts": "ä"}, "counts cannot be decoded"),
        ({"size": [8, 10], "counts": [80]}, "covers no pixel"),
    ],
)
def test_draw_mask_names_what_is_wrong(segmentation, complaint):
    with pytest.raises(DatasetError) as caught:
        draw_mask(segmentation, (8, 10))
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "No such file"),
        ("{", "is not JSON"),
        ("[]", "must be an object with images and annotations"),
        ('{"images": []}', "annotations must be a list"),
        ('{"annotations": [], "images": {}}', "images must be a list"),
        ('{"annotations": [], "images": []}', "nothing can be measured"),
    ],
)
def test_run_stops_at_what_is_not_a_dataset_with_one_line(drawn, text, complaint):
    path = drawn / "instances.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as caught:
        run(drawn)
    assert str(caught.value).startswith(f"error: {path}: ")
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "changes", "complaint"),
    [
        ("annotations", {"image_id": 99}, "annotations[0].image_id: 99 is the id of no usable image"),
        ("annotations", {"image_id": [1]}, "annotations[0].image_id: must be"),
        ("annotations", {"area": "large"}, "annotations[0].area: must be"),
        ("images", {"id": 2}, "images[1].id: 2 is the id of an earlier image too"),
        ("images", {"height": "100"}, "images[0].height: must be"),
        ("images", {"file_name": None}, "images[0].file_name: must be"),
    ],
)
def test_read_dataset_names_a_bad_entry_and_keeps_the_rest(drawn, field, changes, complaint):
    change(drawn, lambda content: content[field][0].update(changes))
    dataset = read(drawn)
    assert dataset.images
    assert dataset.problems[0].startswith(f"instances.json: {complaint}")


def test_read_dataset_names_a_missing_segmentation_and_an_entry_that_is_no_object(drawn):
    change(drawn, lambda content: content["annotations"][0].pop("segmentation"))
    change(drawn, lambda content: content["images"].append(7))
    assert read(drawn).problems == (
        "instances.json: images[2]: must be an object",
        "instances.json: annotations[0].segmentation: is missing",
    )


def test_read_dataset_counts_crowds_and_leaves_them_out(drawn):
    whole = sum(len(image.objects) for image in read(drawn).images)
    change(drawn, lambda content: content["annotations"][0].update(iscrowd=1))
    dataset = read(drawn)
    assert dataset.crowds == 1
    assert dataset.problems == ()
    assert sum(len(image.objects) for image in dataset.images) == whole - 1


def test_load_image_refuses_a_file_of_another_size(drawn):
    change(drawn, lambda content: content["images"][0].update(width=17))
    with pytest.raises(DatasetError, match="its width and height say 17 x"):
        load_image(read(drawn).images[0])


def test_row_file_goes_on_after_its_last_whole_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    with RowFile(path, {"model_id": "a"}, {"commit": "1"}) as rows:
        rows.append(Row("fp32", 1, (score(mask="34"),), ("annotations[3]: bad",)))
        rows.append(Row("fp32", "two", ()))
        expected = dict(rows.rows)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"rung": "fp32", "ima')
    with RowFile(path, {"model_id": "a"}, {"commit": "2"}) as rows:
        assert rows.rows == expected
        rows.append(Row("bf16", 1, (score(),)))
    assert path.read_bytes().startswith(whole + b'{"rung": "bf16"')


def test_row_file_refuses_other_settings_damage_and_what_is_not_its_own(tmp_path):
    path = tmp_path / "rows.jsonl"
    with RowFile(path, {"model_id": "a"}, {}) as rows:
        rows.append(Row("fp32", 1, ()))
        with pytest.raises(JournalError, match="another run is writing it"):
            RowFile(path, {"model_id": "a"}, {})
    with pytest.raises(JournalError, match="another model_id \\('a' then, 'b' now\\)"):
        RowFile(path, {"model_id": "b"}, {})
    with pytest.raises(JournalError, match="another torch"):
        RowFile(path, {"model_id": "a", "torch": "2"}, {})
    path.write_text(path.read_text() + '{"rung": 1}\n')
    with pytest.raises(JournalError, match="line 3 is damaged"):
        RowFile(path, {"model_id": "a"}, {})
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(JournalError, match="is not a file of"):
        RowFile(notes, {}, {})
    assert notes.read_text() == "mine"


def test_summarise_splits_by_cocos_classes_of_size():
    scores = [score(32**2 - 1), score(32**2, own_choice=0.5, flipped=True), score(96**2)]
    lines = {line.objects: line for line in summarise("bf16", ["fp32", "bf16"], scores)}
    assert {name: line.count for name, line in lines.items()} == {"all": 3, "small": 1, "medium": 1, "large": 1}
    assert lines["all"].own_choice == pytest.approx(5 / 6)
    assert (lines["all"].flips, lines["medium"].flips, lines["large"].flips) == (1, 1, 0)
    assert lines["all"].built == "fp32+bf16"


def test_run_goes_on_after_an_interruption_and_adds_rungs(drawn, monkeypatch, capsys):
    original, calls = coco_experiment.score_image, []

    def score_until_interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(coco_experiment, "score_image", score_until_interrupted)
    assert run(drawn, "--rungs", "fp32") == 130
    assert "the same command goes on" in capsys.readouterr().err
    begun = (drawn / "results.jsonl").read_bytes()
    assert len(read_rows(drawn)) == 1

    assert run(drawn, "--rungs", "fp32") == 0
    assert len(calls) == 3
    assert (drawn / "results.jsonl").read_bytes().startswith(begun)
    for row in read_rows(drawn):
        assert row["scores"]
        for found in row["scores"]:
            assert found["vs_fp32"] == 1.0
            assert not found["flipped"]
            assert found["own_choice"] == found["fp32_choice"] <= found["oracle"]

    assert run(drawn, "--rungs", "bf16") == 0
    assert len(calls) == 5
    rows = read_rows(drawn)
    assert [(row["rung"], row["image"]) for row in rows] == [("fp32", 1), ("fp32", 2), ("bf16", 1), ("bf16", 2)]
    rounded = [found for row in rows[2:] for found in row["scores"]]
    assert all(0.8 < found["vs_fp32"] <= 1.0 for found in rounded)
    assert any(found["vs_fp32"] < 1.0 for found in rounded), "bf16 was not applied"
    table = (drawn / "results.csv").read_text().splitlines()
    assert table[0].startswith("rung,built,objects,count,own_choice,fp32_choice,oracle,vs_fp32,flips,")
    assert [line.split(",")[:3] for line in table if ",all," in line] == [
        ["fp32", "fp32", "all"],
        ["bf16", "fp32+bf16", "all"],
    ]

    change(drawn, lambda content: content["annotations"][0].update(iscrowd=1))
    with pytest.raises(SystemExit, match="was begun with another annotations"):
        run(drawn)


def test_rung_stands_on_those_below_it_that_the_device_can_do(monkeypatch, capsys):
    monkeypatch.setattr(coco_experiment, "unsupported", lambda rung, device: "no" if rung == "triton" else None)
    cpu = torch.device("cpu")
    assert coco_experiment.list_prefix("fp32", cpu) == ["fp32"]
    to_int8 = ["fp32", "bf16", "compile", "sdpa", "fused", "int8"]
    assert coco_experiment.list_prefix("int8", cpu) == to_int8
    assert coco_experiment.list_prefix("sparse_mlp", cpu) == [*to_int8, "sparse_mlp"]
    assert coco_experiment.list_prefix("fp8", cpu) == [*to_int8[:-1], "fp8"]
    assert coco_experiment.choose_rungs(None, cpu) == [*to_int8, "sparse"]
    assert "rung triton is left out: no" in capsys.readouterr().err
    assert coco_experiment.choose_rungs(["triton", "bf16"], cpu) == ["fp32", "bf16", "triton"]
    assert "rung triton is tried, but: no" in capsys.readouterr().err


def test_run_goes_on_after_a_rung_that_cannot_be_built_or_gives_no_numbers(drawn, monkeypatch, capsys):
    original = coco_experiment.build_rungs

    class Broken(torch.nn.Module):
        def forward(self, images):
            return torch.full((1, 256, 64, 64), torch.nan)

    def build(image_encoder, rungs, device):
        if rungs[-1] == "sdpa":
            raise ValueError("the rung sdpa\nis not for this device")
        return Broken() if rungs[-1] == "bf16" else original(image_encoder, ["fp32"], device)

    monkeypatch.setattr(coco_experiment, "build_rungs", build)
    assert run(drawn, "--limit", "1", "--rungs", "bf16", "sdpa", "int8") == 1
    output = capsys.readouterr()
    assert "rung sdpa: cannot be built: ValueError: the rung sdpa is not for this device" in output.err
    assert "scene0.png: its embedding with rung bf16 is not finite" in output.err
    assert [row["rung"] for row in read_rows(drawn)] == ["fp32", "int8"]
    assert [found["vs_fp32"] for found in read_rows(drawn)[1]["scores"]] == [1.0] * len(read_rows(drawn)[1]["scores"])


def test_run_names_what_it_cannot_use_and_does_the_other_images(drawn, examples, capsys):
    shutil.copy(drawn / "images/scene0.png", drawn / "images/whole.png")
    (drawn / "images/scene0.png").write_bytes((drawn / "images/scene0.png").read_bytes()[:-500])
    (drawn / "images/scene1.png").unlink()
    height, width = examples[0].image.shape[:2]

    def edit(content):
        content["images"].append({"id": 3, "file_name": "whole.png", "height": height, "width": width})
        square = [[20, 20, 60, 20, 60, 60, 20, 60]]
        content["annotations"] = [
            {"id": 1, "image_id": 1, "segmentation": square},
            {"id": 2, "image_id": 2, "segmentation": square},
            {"id": 3, "image_id": 3, "segmentation": square},
            {"id": 4, "image_id": 3, "segmentation": [[1, 2]]},
            {"id": 5, "image_id": 9, "segmentation": square},
            {"id": 6, "image_id": 3, "segmentation": square, "iscrowd": 1},
        ]

    change(drawn, edit)
    for _ in range(2):
        assert run(drawn, "--rungs", "fp32") == 1
        output = capsys.readouterr()
        assert "1 crowd annotations" in output.out
        assert [line for line in output.err.splitlines() if line.startswith("left out: ")] != []
        for complaint in (
            "annotations[4].image_id: 9 is the id of no usable image",
            "scene1.png: there is no such file",
            "scene0.png: cannot be decoded",
            "annotations[3].segmentation (image whole.png): polygon 0 must be",
        ):
            assert output.err.count(complaint) == 1
    (row,) = read_rows(drawn)
    assert (row["image"], [found["annotation"] for found in row["scores"]]) == (3, [3])
    assert row["scores"][0]["area_px"] == 1600
    runs = row["scores"][0]["mask"]
    assert decode_rle((height, width), runs).shape == (height, width)


def test_run_refuses_a_checkpoint_that_is_missing_and_a_table_as_results(drawn, capsys):
    with pytest.raises(SystemExit, match=r"error: .*vit_b needs its weights"):
        run(drawn, "--model", "vit_b")
    with pytest.raises(SystemExit):
        run(drawn, "--results", "rows.csv")
    assert "--results takes JSON lines" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(drawn, "--device", "tpu9")
    assert "is none of auto, cpu, cuda or cuda:N" in capsys.readouterr().err


def test_pruning_on_images_keeps_more_of_the_masks_than_by_magnitude(drawn):
    def mean_agreement(*words):
        assert run(drawn, "--rungs", "sparse", *words) == 0
        rows = [row for row in read_rows(drawn) if row["rung"] == "sparse"]
        return np.mean([each["vs_fp32"] for row in rows for each in row["scores"]])

    by_magnitude = mean_agreement()
    image = str(next((drawn / "images").iterdir()))
    with pytest.raises(SystemExit):  # the rows of another kind of pruning are not gone on with
        run(drawn, "--rungs", "sparse", "--image", image)
    (drawn / "results.jsonl").unlink()
    assert mean_agreement("--image", image) > by_magnitude + 0.01


def test_image_to_prune_on_that_is_none_is_named_in_one_line(drawn):
    with pytest.raises(SystemExit, match=r"error: --image .*instances\.json: "):
        run(drawn, "--image", str(drawn / "instances.json"))
