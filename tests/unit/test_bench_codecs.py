"""The benchmark of codecs writes and reads real embeddings, and its rows become a table."""

from bench.codecs.__main__ import main
from bench.codecs.rows import Row
from bench.codecs.tables import build_tables
from bench.row_file import read_rows


def test_every_codec_is_written_read_and_compared(tmp_path, capsys):
    main(["--photographs", "1", "--scenes", "0", "--commit", "abc", "--results", str(tmp_path)])
    [path] = tmp_path.iterdir()
    rows = {row.codec: row for row in read_rows(Row, path)}
    assert rows.keys() == {"fp16", "bf16", "int8"}
    assert all(row.clicks > 1 and 0.9 < row.worst_iou <= row.mask_miou <= 1 for row in rows.values())
    assert rows["int8"].mask_miou < rows["fp16"].mask_miou
    assert 2 * rows["int8"].record_bytes < rows["fp16"].record_bytes + 3000
    assert all(row.write_ms > 0 and row.read_ms > 0 for row in rows.values())
    assert "int8: " in capsys.readouterr().out


def test_table_has_the_smallest_last():
    rows = [
        Row(codec, size, 1.25, 0.5, 2, 9, 0.9987, 0.91, 1, "cpu-2-cores", "2", "", "abc", "python -m x")
        for codec, size in (("int8", 1_049_728), ("fp16", 2_097_280))
    ]
    table = build_tables(rows)
    assert "| int8 | 1,049,728 | 1.2 / 0.5 | 2, 9 | 0.9987 | 0.910 | 1 |" in table
    assert table.index("fp16") < table.index("int8")
    assert build_tables([]) == "Not measured yet.\n"
