"""The rows of the page's benchmark become a table; tests/e2e/web runs it in a browser."""

from bench.page.rows import Row
from bench.page.tables import build_tables


def test_table_says_how_long_a_click_takes():
    rows = [
        Row(step, 200, ms, 2 * ms, ms - 20, ms / 4, "Chromium 1", "cpu-2-cores", "2", "", "abc", "python -m x")
        for step, ms in (("first click", 60.0), ("refining click", 62.25))
    ]
    table = build_tables(rows)
    assert "**cpu-2-cores**, torch 2, Chromium 1" in table
    assert "| first click | 200 | 60.0 / 120.0 | 40.0 | 15.0 |" in table
    assert "| refining click | 200 | 62.2 / 124.5 | 42.2 | 15.6 |" in table
    assert build_tables([]) == "Not measured yet.\n"
