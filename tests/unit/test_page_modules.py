"""The labeling page's logic, in Node: run lengths, polygons with holes, files, undo, and who is asked what when."""

import base64
import io
import warnings
import zipfile

import cv2
import numpy as np
import pytest
from page_modules import open_modules
from PIL import Image
from pycocotools import mask as coco_mask

from splitsam.decoder_service.masks import trace_polygons


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    return open_modules(tmp_path_factory.mktemp("modules"))


def blobs(seed, shape=(97, 131)):
    noise = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return (cv2.GaussianBlur(noise, (0, 0), 1 + seed % 5) > 0.02).astype(np.uint8)


def encode(mask):
    rle = coco_mask.encode(np.asfortranarray(mask))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def box_of(mask):
    rows, columns = np.nonzero(mask)
    return [int(side) for side in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]


def describe(mask):
    polygons = [
        {"outer": each.outer.ravel().tolist(), "holes": [hole.ravel().tolist() for hole in each.holes]}
        for each in trace_polygons(mask, 0.0)
    ]
    return {
        "rle": encode(mask),
        "polygons": polygons,
        "box": box_of(mask),
        "area": int(mask.sum()),
        "score": 0.5,
        "stability": 0.6,
    }


def test_every_module_finds_what_it_imports(modules):
    """To the point where `main.js`, which imports them all, looks for the page."""
    script = "return import('./main.js').catch((error) => error.message)"
    assert modules.run('"./labeling.js"', script) == "document is not defined"


def test_run_lengths_are_those_of_pycocotools(modules):
    masks = [blobs(seed) for seed in range(12)]
    masks += [np.ones((7, 5), np.uint8), np.eye(6, dtype=np.uint8), blobs(3, (1, 300)), blobs(4, (300, 1))]
    large = np.zeros((3000, 2000), np.uint8)
    large[2990:, 1990:] = 1  # a run of millions
    masks.append(large)
    given = [[encode(mask), box_of(mask)] for mask in masks]
    drawn = modules.run(
        '{ drawRuns } from "./rle.js"', "return given.map(([rle, box]) => [...drawRuns(rle, box, 9)])", given
    )
    for mask, (_, (x0, y0, x1, y1)), pixels in zip(masks, given, drawn, strict=True):
        assert np.array_equal(np.array(pixels), 9 * mask[y0:y1, x0:x1].ravel())


def test_mask_that_is_cut_off_is_refused(modules):
    script = "try { return readCounts(given) } catch (error) { return error.message }"
    assert modules.run('{ readCounts } from "./rle.js"', script, "oooo") == "the mask is cut off"


def test_polygons_of_coco_keep_their_holes(modules):
    masks = [blobs(seed, (160, 200)) for seed in (6, 7, 11, 12, 16, 17)] + [discs_with_holes()]
    script = """return cocoFile({ name: "a.png", width: 200, height: 160 },
      given.map((mask) => ({ label: "b", mask })), ["a", "b"], "polygons")"""
    content = modules.run('{ cocoFile } from "./coco.js"', script, [describe(mask) for mask in masks])
    assert content["images"] == [{"id": 1, "file_name": "a.png", "width": 200, "height": 160}]
    for mask, entry in zip(masks, content["annotations"], strict=True):
        assert (entry["category_id"], entry["area"], entry["iscrowd"]) == (2, mask.sum(), 0)
        runs = coco_mask.merge(coco_mask.frPyObjects(entry["segmentation"], 160, 200))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # pycocotools 2.0.11 lacks NumPy 2's copy keyword
            drawn = coco_mask.decode(runs)
        # A polygon through the centres of border pixels loses about half of these.
        assert (drawn != mask).sum() < 0.75 * (mask - cv2.erode(mask, np.ones((3, 3), np.uint8))).sum()


def test_mask_too_thin_for_a_polygon_keeps_its_run_lengths(modules):
    mask = np.zeros((20, 30), np.uint8)
    mask[4, 3:9] = 1
    script = 'return cocoFile({ name: "a", width: 30, height: 20 }, [{ label: "a", mask: given }], ["a"], "polygons")'
    content = modules.run('{ cocoFile } from "./coco.js"', script, describe(mask))
    assert content["annotations"][0]["segmentation"] == encode(mask)


def test_png_and_zip_are_read_elsewhere(modules):
    first, second = blobs(1), blobs(2)
    script = """
    const image = { width: 131, height: 97 };
    const content = await maskFile(image, given.map((mask, at) => ({ mask, value: at + 7 })));
    const zip = zipFile([{ name: "größe.png", content }, { name: "empty", content: new Uint8Array() }]);
    return Buffer.from(await zip.arrayBuffer()).toString("base64")"""
    imports = '{ maskFile } from "./png.js"\n{ zipFile } from "./zip.js"'
    text = modules.run(imports, script, [describe(first), describe(second)])
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(text))) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["größe.png", "empty"]
        picture = Image.open(io.BytesIO(archive.read("größe.png")))
    assert np.array_equal(np.asarray(picture), np.where(second, 8, np.where(first, 7, 0)))


def discs_with_holes():
    """[160, 200]; the larger of two pieces has three holes."""
    mask = np.zeros((160, 200), np.uint8)
    for place, radius, inside in (((75, 80), 70, 1), ((50, 60), 22, 0), ((100, 70), 18, 0), ((70, 115), 20, 0)):
        cv2.circle(mask, place, radius, inside, cv2.FILLED)
    cv2.circle(mask, (172, 40), 24, 1, cv2.FILLED)
    cv2.circle(mask, (172, 40), 14, 0, cv2.FILLED)
    return mask


SESSION = '{ Session } from "./session.js"\n{ EMPTY, fieldsOf, maskOf, withBox, withPoint } from "./prompts.js"'


def test_undo_and_redo_step_through_everything(modules):
    script = """
    const session = new Session();
    const seen = [];
    const note = () => seen.push(session.objects.map(({ label, prompt }) => [label, prompt.points.length]));
    const click = (label) => session.ask(withPoint(session.prompt, 1, 2, 1), label);
    for (const step of [() => click("a"), () => click("a"), () => session.finish(), () => click("b"),
        () => session.relabel(1, "c"), () => session.remove(2)]) { step(); note(); }
    for (let step = 0; step < 6; step++) { session.undo(); note(); }
    const { canUndo } = session;
    for (let step = 0; step < 6; step++) { session.redo(); note(); }
    session.undo(); click("d");
    return { seen, canUndo, canRedo: session.canRedo, isSaved: session.isSaved }"""
    told = modules.run(SESSION, script)
    done = [[["a", 1]], [["a", 2]], [["a", 2]], [["a", 2], ["b", 1]], [["c", 2], ["b", 1]], [["c", 2]]]
    assert told["seen"] == [*done, *done[-2::-1], [], *done]
    assert (told["canUndo"], told["canRedo"], told["isSaved"]) == (False, False, False)


def test_refinement_goes_on_from_the_mask_before(modules):
    script = """
    const masks = new WeakMap();
    const one = withPoint(EMPTY, 1, 2, 1);
    const two = withPoint(one, 3, 4, 0);
    const waiting = fieldsOf(two, masks);
    masks.set(one, { refinement_token: "t1" });
    const three = withPoint(two, 5, 6, 1); // the mask of `two` never came
    const box = withBox(two, [9, 8], [1, 3]);
    return [fieldsOf(one, masks), waiting, fieldsOf(two, masks), fieldsOf(three, masks), fieldsOf(box, masks),
      maskOf(box, masks)]"""
    one, waiting, two, three, box, shown = modules.run(SESSION, script)
    assert one == {"points": [[1, 2]], "labels": [1]}
    assert waiting == {"points": [[1, 2], [3, 4]], "labels": [1, 0]}
    assert two == {**waiting, "refinement_token": "t1"}
    assert (three["refinement_token"], three["labels"]) == ("t1", [1, 0, 1])
    assert box == {**waiting, "box": [1, 3, 9, 8]}
    assert shown == {"refinement_token": "t1"}


def test_of_clicks_faster_than_answers_only_the_newest_of_each_object_is_asked(modules):
    script = """
    const asked = [];
    const came = [];
    const failed = [];
    let answer;
    const ask = ({ name }) => new Promise((resolve, reject) => { asked.push(name); answer = { resolve, reject }; });
    const told = { came: ({ name }) => came.push(name), failed: ({ message }) => failed.push(message) };
    const answers = new Answers(ask, told);
    const prompt = (name) => ({ name, points: [1], box: null });
    const settle = async (how) => { answer[how]({ message: "away" }); await new Promise(setImmediate); };
    const [a1, a2, a3, b1] = ["a1", "a2", "a3", "b1"].map(prompt);
    answers.follow([{ prompt: a1 }]);
    answers.follow([{ prompt: a2 }]);
    answers.follow([{ prompt: a3 }, { prompt: b1 }]);
    await settle("resolve");
    await settle("reject");
    await settle("resolve");
    const { isWaiting } = answers;
    answers.retry();
    await settle("resolve");
    answers.follow([{ prompt: a1 }]);
    return { asked, came, failed, isWaiting }"""
    told = modules.run('{ Answers } from "./answers.js"', script)
    assert told["asked"] == ["a1", "a3", "b1", "a3"]
    assert told["came"] == ["a1", "b1", "a3"]
    assert (told["failed"], told["isWaiting"]) == (["away"], False)


def test_zooming_keeps_what_is_at_the_mouse(modules):
    script = """
    const image = { width: 400, height: 100 };
    const whole = fit(image, { width: 800, height: 600 });
    const near = zoom(whole, 3, [123, 300]);
    const at = (view, place) => toImage(view, image, place);
    return [whole, at(whole, [123, 300]), at(near, [123, 300]), at(near, [-9999, 9999]),
      zoom(near, 1e9, [0, 0]).scale, zoom(near, 0, [0, 0]).scale]"""
    whole, before, after, corner, most, least = modules.run('{ fit, toImage, zoom } from "./view.js"', script)
    assert whole == {"scale": 2, "x": 0, "y": 200}
    assert after == pytest.approx(before)
    assert corner == [0, 100]
    assert 0 < least < 1 < most < 100


def test_each_key_does_one_thing_and_the_help_names_it(modules):
    script = """return [BINDINGS, HELP.map(([keys]) => keys), [
      { key: "Z", ctrlKey: true, shiftKey: true }, { key: "z", metaKey: true }, { key: "N", shiftKey: true },
      { key: "?", shiftKey: true }, { key: "ArrowUp", shiftKey: true }, { key: "Enter" }].map(nameOf)]"""
    bindings, shown, names = modules.run('{ BINDINGS, HELP, nameOf } from "./keys.js"', script)
    keys = [key for binding in bindings for key in binding["keys"]]
    assert len(keys) == len(set(keys))
    assert {"Left click", "Drag", "Ctrl Z", "Space"} <= set(shown)
    assert names == ["Ctrl+Shift+z", "Ctrl+z", "n", "?", "Shift+ArrowUp", "Enter"]


def test_labels_are_kept_and_never_none(modules):
    script = """
    const kept = {};
    const storage = { getItem: (name) => kept[name] ?? null, setItem: (name, text) => { kept[name] = text; } };
    const labels = new Labels(storage);
    const empty = labels.add("  ");
    labels.add(" hen "); labels.add("cup"); labels.add("hen");
    const chosen = labels.chosen;
    labels.remove(0); labels.remove(1); labels.remove(0);
    const again = new Labels(storage).names;
    labels.hold(["hen", "bowl", "bowl"]);
    return [empty, chosen, labels.names, again, ["{", "[]", "[1]", "null"].map((text) => {
      kept["splitsam.labels"] = text; return new Labels(storage).names; })]"""
    empty, chosen, names, again, odd = modules.run('{ Labels } from "./labels.js"', script)
    assert (empty, chosen, names, again) == (False, "hen", ["hen", "bowl"], ["hen"])
    assert odd == [["object"]] * 4
