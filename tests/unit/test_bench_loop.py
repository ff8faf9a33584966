"""The loop benchmark clicks on a real decoder service around a wait, and its rows say that there is no model."""

import pytest
from pycocotools import mask as coco_mask

from bench.load.crowd import OK, Outcome
from bench.load.streams import SUPERSEDED
from bench.loop.__main__ import main
from bench.loop.decoder import IMAGE_SIZE, draw_mask
from bench.loop.rows import WITHOUT_THE_MODEL, Row, Setting, Usage, describe_row, summarise
from bench.loop.tables import build_tables
from bench.row_file import read_rows

SETTING = Setting(WITHOUT_THE_MODEL, 8.0, 300.0, "streams", 64, 10.0, 0.1)
MACHINE = {"gpu": "cpu", "torch": "2", "triton": "", "grpcio": "1", "commit": "abc", "command": "python -m x"}


def outcomes(*latencies: float, reason: str = OK) -> list[Outcome]:
    return [Outcome("click", 0.0, ms, reason) for ms in latencies]


def test_clicks_are_answered_after_the_wait_in_both_ways(tmp_path, capsys):
    sizes = ("--rates", "20", "--wait-ms", "30", "--seconds", "2", "--annotators", "20")
    main([*sizes, "--results", str(tmp_path), "--commit", "abc"])
    [path] = tmp_path.iterdir()
    assert path.name.startswith("loop-cpu-")
    rows = read_rows(Row, path)
    assert [row.way for row in rows] == ["calls", "streams"]
    for row in rows:
        assert row.subject == WITHOUT_THE_MODEL
        assert (row.clicks, row.unanswered) == (40, "")
        assert 30 <= row.ms_p50 <= row.ms_p99
        assert 0 < row.loop_ms <= row.process_ms
    told = capsys.readouterr().out.splitlines()
    assert [line.startswith("without the model (30 ms in its place), by ") for line in told[:-1]] == [True, True]


def test_processor_time_is_shared_by_the_clicks_that_were_answered():
    seen = [*outcomes(10, 20, 30, 40), *outcomes(1, reason=SUPERSEDED), *outcomes(2, 2, reason="QUEUE_FULL")]
    row = summarise(SETTING, seen, 2.0, Usage(0.004, 0.006), MACHINE)
    assert (row.clicks, row.answered_s, row.unanswered) == (7, 2.0, "QUEUE_FULL 2, SUPERSEDED 1")
    assert (row.loop_ms, row.process_ms, row.loop_share) == pytest.approx((1.0, 1.5, 0.002))
    assert (row.ms_p50, row.ms_p99) == (30, 40)


def test_without_answers_there_are_no_figures_of_one():
    row = summarise(SETTING, outcomes(5, reason="NOT_READY"), 2.0, Usage(0.004, 0.006), MACHINE)
    assert row.loop_ms is row.process_ms is row.ms_p50 is row.ms_p99 is None
    assert "unanswered NOT_READY 1" in describe_row(row)


def test_every_line_of_the_table_says_that_there_is_no_model():
    table = build_tables([summarise(SETTING, outcomes(10, 20), 10.0, Usage(0.0012, 0.002), MACHINE)])
    line = "| without the model, 8 ms in its place | streams | 300 / 0.2 | 0.6 | 1 | 0% | 20 / 20 |  | 0.1 |"
    assert line in table
    assert "**The decoder service without the model**, cpu, torch 2, grpcio 1" in table
    assert build_tables([]) == "Not measured yet.\n"


def test_the_mask_in_every_answer_is_one_of_the_image():
    mask = draw_mask()
    assert mask.size == IMAGE_SIZE.rows_columns
    drawn = {"size": list(mask.size), "counts": mask.rle}
    assert coco_mask.area(drawn) == mask.area_px
    x0, y0, x1, y1 = mask.box
    assert coco_mask.toBbox(drawn).tolist() == [x0, y0, x1 - x0, y1 - y0]
    assert 1000 < len(mask.rle) < 3000
