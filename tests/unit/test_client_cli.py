"""The command line: parsing, one-line errors and exit statuses."""

import dataclasses
import re

import pytest
import typer

from splitsam.client import cli
from splitsam.client.segment import parse_box, parse_points


@pytest.fixture
def run(capsys):
    """Run the command; returns exit status, stdout and stderr."""

    def command(*arguments):
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return stopped.value.code, output.out, output.err

    return command


def assert_one_line(text, *words):
    assert text.count("\n") == 1, text
    assert text.startswith("splitsam: ")
    assert "Traceback" not in text
    for word in words:
        assert word in text


def test_version(run):
    assert re.fullmatch(r"splitsam \d+\.\d+\.\d+\n", run("--version")[1])


def test_no_command_prints_help(run):
    status, out, _ = run()
    assert status == 0
    for name in ("up", "serve-encoder", "serve-decoder", "optimize", "calibrate", "demo", "segment", "encode", "info"):
        assert f"  {name} " in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], ["nonsense"]),
        (["segment"], ["image"]),
        (["segment", "x.jpg"], ["--point", "--box"]),
        (["segment", "x.jpg", "--point", "1"], ["'1'"]),
        (["segment", "x.jpg", "--everything", "--point", "1,2"], ["--everything", "--point"]),
        (["segment", "x.jpg", "--point", "1,2", "--points-per-side", "4"], ["--points-per-side", "--everything"]),
        (["segment", "x.jpg", "--box", "1,2,3"], ["'1,2,3'"]),
        (["segment", "x.jpg", "--nope"], ["--nope"]),
        (["info", "--timeout", "0"], ["--timeout"]),
        (["encode"], ["paths", "--list", "--coco"]),
        (["encode", "x.jpg", "--root", "."], ["--root", "--list"]),
        (["encode", "x.jpg", "--shard", "3/3"], ["--shard", "'3/3'"]),
        (["up", "--encoder-port", "70000"], ["--encoder-port"]),
        (["demo", "--encoder", "127.0.0.1:1"], ["--decoder"]),
        (["segment", "x.jpg", "--everything", "--set", "points=3"], ["--set", "points_per_batch", "points=3"]),
        (["segment", "x.jpg", "--everything", "--set", "point_grid=[[0.5"], ["--set", "JSON"]),
        (["segment", "x.jpg", "--crop-layers", "1"], ["--everything"]),
        (["optimize", "x.pth", "--out", "x.safetensors"], ["--precision"]),
        (["optimize", "x.pth", "--precision", "int8"], ["--out"]),
        (["calibrate"], ["--images"]),
        (["calibrate", "--images", "no-such-folder"], ["--images", "no-such-folder"]),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(run, arguments, words):
    status, _, err = run(*arguments)
    assert status == 2
    assert_one_line(err, *words)


def test_missing_file_is_one_line_and_status_1(run, tmp_path):
    path = tmp_path / "none.jpg"
    status, _, err = run("segment", path, "--point", "1,2")
    assert status == 1
    assert_one_line(err, str(path), "No such file")


@pytest.mark.parametrize(
    ("precision", "checkpoint", "out", "words"),
    [
        ("fp32", "x.pth", "x.safetensors", ["--precision fp32", "bf16, int8"]),
        ("fp8", "x.pth", "x.safetensors", ["--precision fp8 rounds weights when a service loads them"]),
        ("seed", "absent.pth", "x.safetensors", ["no checkpoint file at absent.pth"]),
        ("seed", "x.pth", "x.pth", ["--out", "ends in .safetensors"]),
        ("seed", "x.pth", "/dev/null/x.safetensors", ["/dev/null"]),
    ],
)
def test_checkpoint_that_cannot_be_optimised_is_one_line(run, tmp_path, monkeypatch, precision, checkpoint, out, words):
    monkeypatch.chdir(tmp_path)
    status, _, err = run("optimize", checkpoint, "--precision", precision, "--out", out)
    assert status == 1
    assert_one_line(err, *words)


def test_nobody_there_is_one_line_with_a_hint(run):
    status, _, err = run("info", "--encoder", "127.0.0.1:1")
    assert status == 1
    assert_one_line(err, "127.0.0.1:1", "splitsam up")


def test_port_in_use_is_one_line(run, tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        status, _, err = run("up", "--run-folder", tmp_path, "--encoder-port", port)
    assert status == 1
    assert_one_line(err, str(port), "--encoder-port")


def test_services_get_their_arguments_and_give_the_status(run, monkeypatch):
    seen = []
    module = type("module", (), {"main": staticmethod(lambda arguments: seen.append(arguments) or 3)})
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)
    assert run("serve-encoder", "--port", "1", "--reflection", "--help")[0] == 3
    assert seen == [["--port", "1", "--reflection", "--help"]]


def test_points_carry_labels():
    assert parse_points(["1,2", "3.5, 4:0", "5,6:1"]) == [(1, 2, 1), (3.5, 4, 0), (5, 6, 1)]


@pytest.mark.parametrize("text", ["", "1", "1,2,3", "1,2:2", "a,b", "1,2:", "nan,1", "1e5,2"])
def test_points_of_another_form_are_refused(text):
    with pytest.raises(typer.BadParameter, match="--point takes"):
        parse_points([text])


def test_box_has_four_edges():
    assert parse_box("1,2, 3.5,4") == (1, 2, 3.5, 4)
    with pytest.raises(typer.BadParameter, match="--box takes"):
        parse_box("1,2,3")


def test_encode_lists_what_failed_and_exits_1(run, tmp_path):
    status, out, err = run("encode", tmp_path / "one.jpg", tmp_path / "two.jpg", "--encoder", "127.0.0.1:1")
    assert status == 1
    assert "0 of 2 images are encoded" in out
    assert err.startswith("failed: 2 images")


def test_up_hands_options_to_the_services():
    from splitsam.client.service_options import collect

    options = collect(
        checkpoint="w.pth",
        device="cuda",
        precision="bf16",
        encoder_arg=["--max-batch=4"],
        decoder_arg=["--max-batch-prompts=9"],
    )
    assert dataclasses.asdict(options) == {
        "encoder_args": ("--checkpoint", "w.pth", "--device", "cuda", "--precision", "bf16", "--max-batch=4"),
        "decoder_args": ("--checkpoint", "w.pth", "--device", "cuda", "--max-batch-prompts=9"),
    }
