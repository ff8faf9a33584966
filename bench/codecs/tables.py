"""Writes the rows of codecs into the tables of the documents.

    python -m bench.codecs.tables             # README.md and bench/README.md
    python -m bench.codecs.tables --check     # changes nothing; fails when something would change

`bench.documents` says how a document asks for them.
"""

import sys
from collections.abc import Sequence

from bench.codecs.rows import Row
from bench.documents import build_table, collector, write_files

_COLUMNS = ("codec", "bytes in Redis", "ms to write / read", "images, clicks", "mask mIoU", "worst", "flips")


def build_tables(rows: Sequence[Row]) -> str:
    """In Markdown, one table for each device; a line is one codec, the smallest last."""
    devices = sorted({row.gpu for row in rows})
    return "\n".join(_table([row for row in rows if row.gpu == device]) for device in devices) or "Not measured yet.\n"


def _table(rows: Sequence[Row]) -> str:
    lines = [
        (
            row.codec,
            f"{row.record_bytes:,}",
            f"{row.write_ms:.1f} / {row.read_ms:.1f}",
            f"{row.images}, {row.clicks}",
            f"{row.mask_miou:.4f}",
            f"{row.worst_iou:.3f}",
            str(row.index_flips),
        )
        for row in sorted(rows, key=lambda row: -row.record_bytes)
    ]
    return build_table(f"**{rows[0].gpu}**, torch {rows[0].torch}", _COLUMNS, lines, rows)


collect_files = collector("codecs", Row, build_tables)


def main(arguments: Sequence[str]) -> None:
    write_files("bench.codecs.tables", __doc__ or "", collect_files, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
