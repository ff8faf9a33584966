"""The page's benchmark, in a browser, on a few clicks."""

from bench.row_file import read_rows


def test_both_kinds_of_clicks_are_timed(browser, tmp_path):
    from bench.page.__main__ import main
    from bench.page.rows import Row

    main(["--clicks", "2", "--device", "cpu", "--commit", "abc", "--results", str(tmp_path)])
    [path] = tmp_path.iterdir()
    rows = {row.step: row for row in read_rows(Row, path)}
    assert rows.keys() == {"first click", "refining click"}
    assert all(0 < row.gateway_ms_p50 + row.paint_ms_p50 < row.ms_p99 for row in rows.values())
    assert all(0 < row.paint_ms_p50 < row.ms_p50 <= row.ms_p99 for row in rows.values())
