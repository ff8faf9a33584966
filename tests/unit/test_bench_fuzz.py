"""The fuzzer itself: it finds what is there, keeps it, plays it again, and survives a target that does not."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from bench.fuzz import run, target
from bench.fuzz.rows import Row, describe_outcomes
from bench.fuzz.run import folder_name, replay, run_target
from bench.fuzz.tables import build_table
from bench.fuzz.target import Broken, Target, judge, refusal
from bench.fuzz.targets import BY_NAME, TARGETS
from bench.fuzz.worker import Recorder, read_current, run_plain
from splitsam.common.errors import InvalidArgument

ROOT = Path(__file__).parents[2]


def check_digit(data: bytes) -> str:
    """Breaks for the digit 7."""
    if data == b"7":
        raise ZeroDivisionError("seven")
    return "odd" if int(data) % 2 else "even"


DIGITS = Target("digits", lambda random: str(random.randrange(10)).encode(), check_digit, share=1)


def test_what_breaks_is_counted_and_kept_once_with_its_traceback(tmp_path: Path):
    recorder = Recorder(DIGITS, tmp_path)
    run_plain(DIGITS, recorder, 200, seed=1)
    report = json.loads(recorder.finish())
    assert report["inputs"] == 200 == sum(report["outcomes"].values())
    assert min(report["outcomes"].values()) > 5
    [(place, name)] = report["crashes"].items()
    assert "ZeroDivisionError in check_digit" in place
    assert (tmp_path / name).read_bytes() == b"7"
    assert "seven" in (tmp_path / f"{name}.txt").read_text()


def test_the_same_seed_makes_the_same_inputs():
    for each in TARGETS:
        assert each.make(Random(3)) == each.make(Random(3))


def test_a_crash_is_played_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(BY_NAME, "digits", DIGITS)
    folder = tmp_path / folder_name("digits")
    folder.mkdir()
    for name, data in {"bad": b"7", "good": b"4"}.items():
        (folder / name).write_bytes(data)
    assert "ZeroDivisionError: seven" in replay(folder / "bad")
    assert replay(folder / "good") == "even"


def test_the_input_at_which_a_process_died_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def dying(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        script = (
            "import os, sys; from pathlib import Path; from bench.fuzz.worker import Recorder; "
            "from bench.fuzz.target import Target; "
            "die = Target('dies', None, lambda data: os.abort(), 1); "
            "Recorder(die, Path(sys.argv[1])).judge(b'poison')"
        )
        words = [sys.executable, "-c", script, str(tmp_path)]
        return real_run(words, capture_output=True, text=True, check=False, cwd=ROOT)

    real_run = subprocess.run
    monkeypatch.setattr(run.subprocess, "run", dying)
    report = run_target("images", inputs=1, seed=1, guided=False, folder=tmp_path)
    [(ended, name)] = report.crashes.items()
    assert "status -6" in ended
    assert (tmp_path / name).read_bytes() == b"poison" == read_current(tmp_path)


@pytest.mark.parametrize(
    "guided",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed"),
        ),
    ],
)
def test_a_worker_reads_the_inputs_it_was_told_to(tmp_path: Path, guided: bool):
    report = run_target("image headers", inputs=300, seed=1, guided=guided, folder=tmp_path)
    assert report.inputs == 300 == sum(report.outcomes.values())
    assert report.crashes == {}
    assert (report.kept > 5) == guided


def test_an_input_that_takes_too_long_is_broken(monkeypatch: pytest.MonkeyPatch):
    def spin(_: bytes) -> str:
        while True:
            pass

    monkeypatch.setattr(target, "LIMIT_CPU_S", 0.05)
    with pytest.raises(Broken, match="s of the processor"):
        judge(Target("spin", lambda random: b"", spin, share=1), b"")


def test_an_input_that_takes_much_memory_is_broken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(target, "LIMIT_MIB", 64)
    size_bytes = int(2**20 * (target.peak_mib() + 100))
    with pytest.raises(Broken, match="MiB more"):
        judge(Target("hog", lambda random: b"", lambda data: str(len(b"\1" * size_bytes)), share=1), b"")


@pytest.mark.parametrize(
    "error",
    [InvalidArgument("nowhere", "is wrong"), InvalidArgument("image", ""), InvalidArgument("image", "a\nb")],
    ids=str,
)
def test_a_refusal_that_helps_nobody_is_broken(error: InvalidArgument):
    with pytest.raises(Broken):
        refusal(error, lambda field: field == "image")
    assert refusal(InvalidArgument("image", "is wrong"), lambda field: field == "image") == "INVALID_ARGUMENT"


def test_the_table_shows_crashes_and_adds_up():
    described = {"seed": 1, "device": "cpu", "versions": "v", "commit": "abc", "command": "python -m bench.fuzz"}
    outcomes = describe_outcomes({"a": 1, "b": 1500})
    rows = [
        Row(name, "seeded", 1501, 2.0, outcomes, crashes, 0, 300.0, **described)
        for name, crashes in (("x", 0), ("y", 2))
    ]
    table = build_table(rows)
    assert "| x | seeded | 1,501 | 2 | b 1500; a 1 | 0 | 300 |" in table
    assert "| **y** |" in table
    assert "| all | | 3,002 | 4 | | 2 | |" in table
