"""The clients of examples/, in every language that can be run here, against real services."""

import base64
import io
import json
import warnings

import numpy as np
import pytest
from e2e_support import (
    decode_rle,
    draw,
    image_file,
    metric,
    point,
    prompt,
    running_service,
    write_embedding,
)
from example_support import EXAMPLES
from PIL import Image
from pycocotools import mask as coco


def test_lock_file_pins_what_it_names_and_no_registry():
    package, lock = (
        json.loads((EXAMPLES / "node" / name).read_text()) for name in ("package.json", "package-lock.json")
    )
    packages = lock["packages"]
    for name, version in package["dependencies"].items():
        assert packages[f"node_modules/{name}"]["version"] == version
    assert not any("resolved" in entry for entry in packages.values())
    assert all(entry["integrity"].startswith("sha512-") for path, entry in packages.items() if path)


def test_an_example_clicks_and_refines_and_draws_the_mask(alpha, where, example, tmp_path, photo, key):
    (tmp_path / "photo.png").write_bytes(photo)
    clicks = "--click", "100,120", "--click", "200.5,60:0"
    result = example.run("click", *clicks, "--out", tmp_path / "mask.png", *where, tmp_path / "photo.png")
    assert result.returncode == 0, result.stderr
    first, second = point(100, 120), point(200.5, 60, 2)
    [[begun]] = [answer.masks for answer in alpha.click(key, prompt(first), refinement_tokens=True)]
    asked = prompt(first, second, refinement_token=begun.refinement_token)
    [[refined]] = [answer.masks for answer in alpha.click(key, asked)]
    assert result.stdout.splitlines() == [
        f"{tmp_path / 'photo.png'}: 320 x 240, was encoded before",
        f"1 clicks: score {begun.predicted_iou:.3f}, area {begun.area_px} px",
        f"2 clicks: score {refined.predicted_iou:.3f}, area {refined.area_px} px",
    ]
    with Image.open(io.BytesIO((tmp_path / "mask.png").read_bytes())) as overlay:
        assert ((np.array(overlay)[..., 3] > 0) == decode_rle(refined.rle)).all()


def test_an_example_sends_an_image_that_nobody_has_encoded(alpha, where, example, tmp_path):
    fresh = image_file(draw(sum(example.language.encode())))
    (tmp_path / "fresh.png").write_bytes(fresh)
    assert not alpha.look_up(fresh).found
    assert "sent and encoded" in example.run("click", "--click", "1,1", *where, tmp_path / "fresh.png").stdout
    assert alpha.look_up(fresh).found


def test_an_example_says_what_was_refused(where, example, tmp_path, photo):
    (tmp_path / "photo.png").write_bytes(photo)
    result = example.run("click", "--click", "999,1", *where, tmp_path / "photo.png")
    assert result.returncode == 1
    expected = "images[0].prompts[0].points[0].x: must be 0 to 320, the image's width in pixels; got 999"
    assert result.stderr.startswith(f"{expected} [INVALID_ARGUMENT], request ")


def test_an_example_encodes_again_drops_tokens_and_waits_as_told(
    alpha, stack, service_args, where, example, tmp_path, photo, key
):
    """Against a decoder that takes three requests a second: some of the calls made at once have to wait."""
    (tmp_path / "photo.png").write_bytes(photo)
    others = write_embedding(stack, "alpha", "f" * 64, "made by another model")
    with running_service(stack, "decoder", *service_args, "--tenant-requests-per-s", "3") as limited:
        keys = "0" * 64, others
        result = example.run("recovery", stack.encoder, limited.address, where[-1], tmp_path / "photo.png", *keys)
        waited = metric(limited.metrics_url, "splitsam_refusals_total", reason="QUOTA_EXCEEDED")
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)
    [answer] = alpha.click(key, prompt(point(100, 120)))
    assert (printed["key"], printed["sent"]) == (key, False)
    *renewed, refused = printed["answers"]
    assert renewed == [{"key": key, "area": answer.masks[0].area_px}] * 2 + renewed[2:]
    assert renewed[2]["key"] == key  # without its token, as asked for a mask of its own
    assert refused["reason"] == "INVALID_ARGUMENT"
    assert refused["violations"][0]["field"] == "images[0].embedding_key"
    assert refused["requestId"]
    assert waited > 0


@pytest.fixture(scope="module")
def cacheless(stack, encoder_args):
    """An encoder that finds no Redis where it is told to look."""
    with running_service(stack, "encoder", *encoder_args, "--redis-url", "redis://127.0.0.1:1/0") as service:
        yield service


def test_without_a_cache_an_example_sends_the_image_and_gives_up_after_a_second_time(
    cacheless, stack, where, example, tmp_path
):
    (tmp_path / "photo.png").write_bytes(image_file(draw(1000 + sum(example.language.encode()))))
    before = metric(cacheless.metrics_url, "splitsam_requests_total", method="EncodeImage", code="OK")
    options = "--encoder", cacheless.address, "--decoder", stack.decoder, *where[4:]
    result = example.run("click", "--click", "1,1", *options, tmp_path / "photo.png")
    assert "sent and encoded" in result.stdout, result.stderr
    assert result.returncode == 1
    assert "[EMBEDDING_EXPIRED], request " in result.stderr
    after = metric(cacheless.metrics_url, "splitsam_requests_total", method="EncodeImage", code="OK")
    assert after - before == 2


def test_an_example_decodes_run_lengths_as_coco_does(example):
    rng = np.random.default_rng(7)
    shapes = [(1, 1), (7, 3), (64, 48), (3, 5000)]
    masks = [rng.random(shape) < share for shape in shapes for share in (0.0, 0.02, 0.5, 1.0)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # https://github.com/ppwwyyxx/cocoapi, as in e2e_support
        encoded = [coco.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]
    runs = [{"size": list(one["size"]), "counts": one["counts"].decode()} for one in encoded]
    result = example.run("runs", stdin=json.dumps(runs))
    assert result.returncode == 0, result.stderr
    for mask, printed in zip(masks, json.loads(result.stdout), strict=True):
        assert base64.b64decode(printed) == mask.astype(np.uint8).tobytes()


def test_the_five_lines_of_the_readme_print_a_mask(open_stack, node):
    text = (node.folder / "five_lines.mjs").read_text()
    for default, actual in (("127.0.0.1:50051", open_stack.encoder), ("127.0.0.1:50052", open_stack.decoder)):
        assert default in text
        text = text.replace(default, actual)
    (node.folder / "five_lines.mjs").write_text(text)
    result = node.run("five_lines")
    assert result.returncode == 0, result.stderr
    assert "predictedIou: " in result.stdout
    assert "size: [ 480, 640 ]" in result.stdout
