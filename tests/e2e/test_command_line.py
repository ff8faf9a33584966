"""The installed command `splitsam` against running services."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess

import pytest
from e2e_support import COMMAND, is_serving, run_command, wait_until
from PIL import Image, ImageChops

from splitsam.client.processes import free_ports


def assert_one_line_of_complaint(result, status):
    assert result.returncode == status
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("splitsam: ")
    assert "Traceback" not in line


@pytest.fixture
def picture(tmp_path, photo):
    (tmp_path / "photo.png").write_bytes(photo)
    return tmp_path / "photo.png"


def test_segment_prints_json_and_draws_what_it_found(client, where, picture, tmp_path):
    options = "--point", "100,120", "--point", "9,9:0", "--all", "--json", "--out", "drawn/overlay.png"
    result = run_command("segment", picture, *options, *where, folder=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    printed = json.loads(result.stdout)
    assert (printed["width_px"], printed["height_px"]) == (320, 240)
    prompt = {"points": [(100, 120), (9, 9)], "labels": [1, 0]}
    masks = client.predict(printed["embedding_key"], **prompt, selection="all")
    assert [mask["index"] for mask in printed["masks"]] == [1, 2, 3]
    for shown, mask in zip(printed["masks"], masks, strict=True):
        assert (shown["area_px"], shown["box"], shown["rle"]) == (mask.area_px, list(mask.box), mask.rle)
        assert shown["score"] == pytest.approx(mask.score, abs=1e-6)
    overlay, photo = (Image.open(path).convert("RGB") for path in (tmp_path / "drawn/overlay.png", picture))
    assert overlay.width >= photo.width
    assert overlay.size != photo.size or ImageChops.difference(overlay, photo).getbbox()


def test_segment_prints_a_line_for_a_box(where, picture, tmp_path):
    result = run_command("segment", picture, "--box", "20,30,200,180", *where, folder=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout.splitlines()) == 1
    assert "score" in result.stdout


def test_segment_finds_everything(where, picture, tmp_path):
    options = "--everything", "--points-per-side", "2", "--min-score", "0", "--min-stability", "0"
    result = run_command("segment", picture, *options, "--json", "--out", "drawn/all.png", *where, folder=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    masks = json.loads(result.stdout)["masks"]
    assert masks
    assert all(mask["point"] in ([80, 60], [240, 60], [80, 180], [240, 180]) for mask in masks)
    overlay, photo = (Image.open(path).convert("RGB") for path in (tmp_path / "drawn/all.png", picture))
    assert overlay.size == photo.size
    assert ImageChops.difference(overlay, photo).getbbox()


def test_segment_that_finds_nothing_says_what_to_try(where, picture, tmp_path):
    options = "--everything", "--points-per-side", "1", "--min-score", "1"
    result = run_command("segment", picture, *options, *where, folder=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "0 masks; try a lower --min-score and --min-stability\n"


def test_info_names_model_and_limits(where, model_name, model_id, tmp_path):
    as_text, as_json = (run_command("info", *options, *where, folder=tmp_path) for options in ((), ("--json",)))
    assert (as_text.returncode, as_text.stderr) == (0, "")
    assert (f"{model_name} (demonstration model)" in as_text.stdout) == (model_name == "vit_t")
    assert model_name in as_text.stdout
    assert model_id in as_text.stdout
    info = json.loads(as_json.stdout)
    assert info["encoder"]["model_id"] == info["decoders"][0]["model_id"] == model_id
    assert info["encoder"]["limits"]["max_image_bytes"] == 32 * 2**20


@pytest.mark.parametrize(
    ("arguments", "status", "named"),
    [
        (["segment", "missing.png", "--point", "1,1"], 1, "missing.png"),
        (["segment", "photo.png", "--point", "9999,1"], 1, "0 to 320"),
        (["segment", "text.png", "--point", "1,1"], 1, "JPEG, PNG, WEBP"),
        (["segment", "photo.png", "--point", "here"], 2, "x,y"),
        (["segment", "photo.png"], 2, "--point"),
        (["segment", "photo.png", "--unknown"], 2, "--unknown"),
    ],
    ids=["no such file", "outside", "no image", "no point", "no prompt", "no such option"],
)
def test_mistake_is_one_line(where, picture, tmp_path, arguments, status, named):
    (tmp_path / "text.png").write_text("this is text")
    result = run_command(*arguments, *where, folder=tmp_path)
    assert_one_line_of_complaint(result, status)
    assert named in result.stderr


def test_wrong_token_is_one_line(where, picture, tmp_path):
    (tmp_path / "token").write_text("wrong-token-0123456789")
    result = run_command("segment", picture, "--point", "1,1", *where, folder=tmp_path)
    assert_one_line_of_complaint(result, 1)
    assert "UNAUTHENTICATED" in result.stderr


def test_nobody_listening_is_one_line(tmp_path, picture):
    encoder, decoder = (f"127.0.0.1:{port}" for port in free_ports(2))
    result = run_command(
        "segment", picture, "--point", "1,1", "--encoder", encoder, "--decoder", decoder, folder=tmp_path
    )
    assert_one_line_of_complaint(result, 1)
    assert "splitsam up" in result.stderr


def test_bad_setting_of_a_service_is_one_line(tmp_path):
    result = run_command("serve-encoder", "--checkpoint", "missing.safetensors", folder=tmp_path)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "error: no checkpoint file at missing.safetensors"
    assert "Traceback" not in result.stderr


@pytest.mark.own_services
def test_up_serves_until_it_is_told_to_stop(weights, picture, tmp_path):
    options = "--checkpoint", str(weights), "--device", "cpu", "--run-folder", str(tmp_path / "run")
    command = [COMMAND, "up", "--free-ports", *options]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as up:
        try:
            shown = []
            while (line := up.stdout.readline()) and not line.startswith("Ctrl-C"):
                shown.append(line)
            assert "demonstration model" in "".join(shown)
            words = [line.split() for line in shown if line.strip()]
            encoder, decoder = (next(row[1] for row in words if row[0] == name) for name in ("encoder", "decoder"))
            where = "--encoder", encoder, "--decoder", decoder
            result = run_command("segment", picture, "--point", "100,120", *where, folder=tmp_path)
            assert result.returncode == 0, result.stderr
        finally:
            up.terminate()
        assert up.stdout.read().splitlines()[-1] == "stopped"
    assert up.returncode == 0
    wait_until(lambda: not is_serving(encoder) and not is_serving(decoder), "both services are gone")


def test_top_prints_one_table_and_says_who_is_away(stack, model_name, precision, tmp_path):
    addresses = [stack.metrics_url(name) for name in ("encoder", "decoder")]
    result = run_command("top", *addresses, "--once", "--interval", "0.2", folder=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("serving") == 2
    assert re.findall(rf"{model_name} (\w+) on", result.stdout) == [precision, "fp32"]
    result = run_command("top", addresses[0], "127.0.0.1:1", "--once", "--interval", "0.2", folder=tmp_path)
    assert result.returncode == 1
    assert (result.stdout.count("serving"), result.stdout.count("no answer")) == (1, 1)


def test_top_watches_on_a_terminal_until_it_is_interrupted(stack):
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "150", "LINES": "40"}
    command = [COMMAND, "top", stack.metrics_url("encoder"), "--interval", "0.2"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as watching:
        try:
            os.close(theirs)
            seen = b""
            while seen.count(b"serving") < 3:  # looked at, and looked at again
                seen += os.read(ours, 65_536)
            watching.send_signal(signal.SIGINT)
            with contextlib.suppress(OSError):  # Linux' way to say that nobody writes any more
                while tail := os.read(ours, 65_536):
                    seen += tail
            os.close(ours)
            assert watching.wait(60) == 0
        finally:
            watching.kill()
    assert b"Traceback" not in seen
