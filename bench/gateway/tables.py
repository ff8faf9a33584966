"""Writes the gateway's rows into the tables of the documents.

    python -m bench.gateway.tables             # README.md and bench/README.md
    python -m bench.gateway.tables --check     # changes nothing; fails when something would change

`bench.documents` says how a document asks for them.
"""

import sys
from collections.abc import Sequence

from bench.documents import build_table, collector, write_files
from bench.gateway.rows import Row

_COLUMNS = ("way", "clicks", "ms p50 / p99", "added ms p50")


def build_tables(rows: Sequence[Row]) -> str:
    """In Markdown, one table for each device; a line is one way to click."""
    devices = sorted({row.gpu for row in rows})
    return "\n".join(_table([row for row in rows if row.gpu == device]) for device in devices) or "Not measured yet.\n"


def _table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        added = "" if row.way == "client" else f"{row.added_ms_p50:.1f}"
        lines.append((row.way, str(row.clicks), f"{row.ms_p50:.1f} / {row.ms_p99:.1f}", added))
    return build_table(f"**{rows[0].gpu}**, torch {rows[0].torch}", _COLUMNS, lines, rows)


collect_files = collector("gateway", Row, build_tables)


def main(arguments: Sequence[str]) -> None:
    write_files("bench.gateway.tables", __doc__ or "", collect_files, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
