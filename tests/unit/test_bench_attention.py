"""The attention benchmark's rows become a table, with PyTorch's variants beside ours."""

from bench.attention.rows import Row
from bench.attention.tables import build_tables

MACHINE = {"gpu": "H100", "driver": "1", "torch": "2", "triton": "3", "commit": "abc", "command": "python -m x"}


def row(variant, ms, **changed):
    return Row(**{"model": "ViT-B", "kind": "window", "batch": 16, "variant": variant, "ms": ms, **MACHINE, **changed})


def test_table_has_a_line_for_each_layer_that_was_timed():
    rows = [
        row("candidate", 0.1, tflops=400.0, error=1e-3),
        row("this kernel", 0.3169, tflops=124.5, error=3.4e-3, allowed_error=9.2e-3),
        row("cuDNN SDPA, no bias", 0.2479, tflops=159.2, error=2.3e-3),
        row("flash SDPA, no bias", None, note="OutOfMemoryError"),
        row("this kernel", None, batch=8, note="WRONG, not timed"),
    ]
    table = build_tables(rows)
    assert "| ViT-B, window | 16 | 0.317 | 124 | 3.4e-03 / 4.6e-03 |  |  | 0.248 |  |" in table
    assert table.count("ViT-B") == 1
    assert "`python -m x` at abc" in table
    assert build_tables([]) == "Not measured yet.\n"


def test_lines_for_people_say_what_went_wrong():
    assert row("this kernel", None, note="WRONG, not timed").line().endswith("WRONG, not timed")
    assert "0.3169 ms" in row("this kernel", 0.3169, tflops=124.5, error=3.4e-3).line()
