"""Writes the page's rows into the tables of the documents.

    python -m bench.page.tables             # README.md and bench/README.md
    python -m bench.page.tables --check     # changes nothing; fails when something would change

`bench.documents` says how a document asks for them.
"""

import sys
from collections.abc import Sequence

from bench.documents import build_table, collector, write_files
from bench.page.rows import Row

_COLUMNS = ("step", "clicks", "ms p50 / p99", "in the gateway, ms p50", "answer to paint, ms p50")


def build_tables(rows: Sequence[Row]) -> str:
    """In Markdown, one table for each device."""
    devices = sorted({row.gpu for row in rows})
    return "\n".join(_table([row for row in rows if row.gpu == device]) for device in devices) or "Not measured yet.\n"


def _table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        times = f"{row.ms_p50:.1f} / {row.ms_p99:.1f}", f"{row.gateway_ms_p50:.1f}", f"{row.paint_ms_p50:.1f}"
        lines.append((row.step, str(row.clicks), *times))
    return build_table(f"**{rows[0].gpu}**, torch {rows[0].torch}, {rows[0].browser}", _COLUMNS, lines, rows)


collect_files = collector("page", Row, build_tables)


def main(arguments: Sequence[str]) -> None:
    write_files("bench.page.tables", __doc__ or "", collect_files, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
