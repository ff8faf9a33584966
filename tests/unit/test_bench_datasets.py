"""The dataset benchmark runs the real commands against real services, and its rows become a table."""

import dataclasses

import pytest

from bench.datasets.__main__ import main
from bench.datasets.rows import Row
from bench.datasets.tables import build_tables
from bench.row_file import read_rows


def test_commands_run_twice_and_the_second_time_nothing_is_sent(tmp_path, capsys):
    sizes = "--encode-images", "3", "--export-images", "1", "--boxes", "3"
    main([*sizes, "--device", "cpu", "--results", str(tmp_path), "--commit", "abc"])
    [path] = tmp_path.iterdir()
    rows = {row.scenario: row for row in read_rows(Row, path)}
    assert set(rows) == {"encode", "encode again", "export", "export again"}
    for first, again in (("encode", "encode again"), ("export", "export again")):
        assert rows[first].sent_kib > rows[first].files_kib
        assert rows[again].sent_kib < rows[again].files_kib / rows[again].images / 10  # not a part of one image
        assert rows[first].encoder_share > 0 == rows[again].encoder_share
        assert rows[again].image_fill is None
    assert rows["export again"].decoder_share > 0 < rows["export again"].write_share
    assert 1 <= rows["export"].prompt_fill <= 4
    assert "encode again: 3 images" in capsys.readouterr().out


@pytest.fixture
def row():
    figures = 200, 0, 1.5, 0.9, 222.2, 30.4, 40_000.0, None, None, 0.0, 0.0, 0.5, 0.0, 0.0, 0.25
    return Row("encode again", *figures, "cpu-2-cores", "2", "", "abc", "python -m x")


def test_table_says_what_was_sent_and_where_the_time_went(row):
    export = dataclasses.replace(row, scenario="export", boxes=500, prompt_fill=3.9, image_fill=1.0)
    lines = build_tables([export, row]).splitlines()
    assert lines[4] == "| encode again | 200 |  | 1.50 | 222.2 | 30 / 40000 |  /  | 0% | 0% | 50% | 0% | 0% |"
    assert lines[5].startswith("| export | 200 | 500 | 1.50 | 222.2 | 30 / 40000 | 1.00 / 3.90 |")
    assert build_tables([]) == "Not measured yet.\n"
