"""The gateway benchmark starts everything, clicks in every way, and its rows become a table."""

from bench.gateway.__main__ import main
from bench.gateway.rows import Row
from bench.gateway.tables import build_tables
from bench.row_file import read_rows


def test_every_way_of_clicking_is_timed(tmp_path, capsys):
    main(["--clicks", "3", "--device", "cpu", "--commit", "abc", "--results", str(tmp_path)])
    [path] = tmp_path.iterdir()
    rows = {row.way: row for row in read_rows(Row, path)}
    assert rows.keys() == {"client", "gateway", "pointer"}
    assert all(0 < row.ms_p50 <= row.ms_p99 for row in rows.values())
    assert rows["client"].added_ms_p50 == 0
    assert "gateway: " in capsys.readouterr().out


def test_table_says_what_each_way_adds():
    rows = [
        Row(way, 500, ms, 2 * ms, ms - 40, "cpu-2-cores", "2", "", "abc", "python -m x")
        for way, ms in (("client", 40.0), ("gateway", 42.25))
    ]
    table = build_tables(rows)
    assert "| client | 500 | 40.0 / 80.0 |  |" in table
    assert "| gateway | 500 | 42.2 / 84.5 | 2.2 |" in table
    assert build_tables([]) == "Not measured yet.\n"
