"""The encode benchmark runs the real service, and what its clients saw becomes a row and a table."""

import dataclasses

import pytest

from bench.calls import make_different
from bench.encode.__main__ import main
from bench.encode.rows import NOT_STORED, Row, Setting, Usage, summarise
from bench.encode.tables import build_tables
from bench.load.crowd import OK, Outcome
from bench.row_file import read_rows

OPTIONS = ("--model", "vit_t", "--device", "cpu", "--commit", "abc")
SETTING = Setting("vit_b", "bf16", "1,4,16", 2, "--decode-threads 8", 64, 4, 10.0, 16)
USAGE = Usage(15.5, 3.25, 0.5, 1.75, 800.0, 810.0, 3001.4, 3002.0, 16500.0, 16511.2)
MACHINE = {"gpu": "H100", "torch": "2", "triton": "3", "commit": "abc", "command": "python -m x"}


def outcome(ended_s: float, reason: str = OK, ms: float = 500.0) -> Outcome:
    stages = {} if reason not in (OK, NOT_STORED) else {"queue": ms / 2, "model": 40.0}
    return Outcome("encode", ended_s - ms / 1000, ms, reason, stages_ms=stages)


def test_clients_are_answered_and_counted(tmp_path, capsys):
    sizes = (
        "--clients",
        "3",
        "--generators",
        "2",
        "--seconds",
        "8",
        "--batch-sizes",
        "1",
        "--encoder-arg=--max-queue=2",
    )
    main([*OPTIONS, *sizes, "--results", str(tmp_path)])
    [path] = tmp_path.iterdir()
    [row] = read_rows(Row, path)
    assert path.name.startswith("encode-cpu-")
    assert (row.clients, row.generators, row.batch_sizes, row.encoder_args) == (3, 2, "1", "--max-queue=2")
    assert row.images > 0
    assert row.img_s == pytest.approx(row.images / 8)
    assert row.share == pytest.approx(row.img_s / row.model_img_s, rel=1e-3)
    assert 0 < row.ms_p50 <= row.ms_p99
    assert row.stages.startswith("cache ")
    assert row.refusals == f"QUEUE_FULL {row.refused}"  # two places for three clients, who try again
    assert row.not_stored == 0
    assert min(row.encoder_cores, row.redis_sets_s, row.redis_mib_s) > 0
    assert min(row.encoder_mib_first, row.encoder_mib_last) > 100  # torch alone takes more
    assert min(row.redis_mib_first, row.redis_mib_last) > 1
    assert "vit_t fp32, 1 encoders, 3 clients: " in capsys.readouterr().out


def test_precision_that_the_device_cannot_do_is_refused_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"error: precision: seed .*"):
        main([*OPTIONS, "--precision", "seed", "--results", str(tmp_path)])


def test_only_answers_of_the_measured_time_are_counted():
    seen = [outcome(-0.1), outcome(0.1), outcome(5, ms=900.0), outcome(9.9), outcome(10.1)]
    seen += [outcome(3, NOT_STORED), outcome(-1, "QUEUE_FULL"), outcome(4, "QUEUE_FULL"), outcome(5, "QUEUE_FULL")]
    row = summarise(SETTING, 16, 0.4, seen, USAGE, MACHINE)
    assert (row.images, row.not_stored, row.refused, row.refusals) == (3, 1, 2, "QUEUE_FULL 2")
    assert (row.img_s, row.share) == (pytest.approx(0.3), pytest.approx(0.75))
    assert (row.ms_p50, row.ms_p99) == (500, 900)
    assert row.stages == "queue 250 / 450, model 40 / 40"
    assert summarise(SETTING, 16, 0.4, [], USAGE, MACHINE).ms_p50 is None


def test_images_of_all_callers_differ():
    images = {make_different(b"jpeg", caller, number) for caller in range(3) for number in range(300)}
    assert len(images) == 900
    assert all(image.startswith(b"jpeg") for image in images)


def test_table_says_what_the_model_alone_does_and_what_was_busy():
    seen = [outcome(second + number / 400) for second in range(10) for number in range(385)]
    row = summarise(SETTING, 16, 450.0, seen, USAGE, MACHINE)
    table = build_tables([row])
    assert "**H100**, 16 CPU cores, torch 2, triton 3" in table
    assert "| vit_b | bf16 | 1,4,16 | 2 | `--decode-threads 8` | 64 in 4 | 385 | 450 | 85.6% |" in table
    assert "| 15.50 |  |  | 3.25 / 0.50 / 1.75 | 800, 810 | 3001 / 3002 | 16500 / 16511 |" in table
    before = dataclasses.replace(row, encoder_mib_first=None, encoder_mib_last=None)  # as rows were once written
    assert "| 800, 810 |  | 16500 / 16511 |" in build_tables([before])
    assert build_tables([]) == "Not measured yet.\n"
