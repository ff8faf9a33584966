"""The benchmark of the kernels that quantise, at a size that a CPU can do."""

import pytest

from bench.elementwise.__main__ import main
from bench.elementwise.rows import Row
from bench.elementwise.tables import build_tables
from bench.row_file import read_rows


def test_every_kernel_and_product_is_checked_and_timed(tmp_path, capsys):
    main(["--models", "vit_b", "--rows", "16", "--device", "cpu", "--commit", "abc", "--results", str(tmp_path)])
    [path] = tmp_path.iterdir()
    rows = {row.operation: row for row in read_rows(Row, path)}
    kernels = ["normalise_rows", "add_normalise_rows", "quantise_rows", "quantise_rows, GELU"]
    products = [f"{layer}, {precision}" for layer in ("qkv", "proj", "lin1", "lin2") for precision in ("bf16", "fp8")]
    apart, inside = "lin1, bf16, then GELU", "lin1, bf16, GELU inside"
    rounded = "lin1, fp8, GELU and rounding inside"
    assert rows.keys() == {*kernels, *products, apart, inside, rounded}
    assert all(row.ms > 0 and row.gb_s > 0 and row.commit == "abc" for row in rows.values())
    for name, row in rows.items():
        bound = 0.03 if name in kernels else 0.05 if ", fp8" in name else 0.004
        assert 1e-4 < row.error < bound, name
        assert (row.tflop_s is None) == (name in kernels)
    added = rows["add_normalise_rows"]
    # Reads two rows of 768 in 16 bits, writes one, 768 e4m3 and a scale.
    assert added.gb_s * added.ms * 1e6 == pytest.approx(16 * (7 * 768 + 4), rel=1e-3)
    assert "vit_b | 16 | qkv, fp8 | 768 -> 2304 |" in capsys.readouterr().out


def test_table_has_the_rows_as_they_are():
    machine = ("H100", "2", "3", "abc", "python -m x")
    row = Row("vit_h", 32768, "lin1, fp8", "1280 -> 5120", 0.4172, 920.4, 1029.2, 0.037, *machine)
    table = build_tables([row])
    assert "**H100**, torch 2, triton 3" in table
    assert "| vit_h | 32768 | lin1, fp8 | 1280 -> 5120 | 0.4172 | 920 | 1029 | 3.7e-02 |" in table
    assert build_tables([]) == "Not measured yet.\n"
