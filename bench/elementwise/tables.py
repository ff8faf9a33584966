"""Writes the rows of the elementwise benchmark into the tables of the documents.

    python -m bench.elementwise.tables             # README.md and bench/README.md
    python -m bench.elementwise.tables --check     # changes nothing; fails when something would change

`bench.documents` says how a document asks for them.
"""

import sys
from collections.abc import Sequence

from bench.documents import build_table, collector, write_files
from bench.elementwise.rows import COLUMNS, Row


def build_tables(rows: Sequence[Row]) -> str:
    """In Markdown, one table for each device."""
    devices = sorted({row.gpu for row in rows})
    return "\n".join(_table([row for row in rows if row.gpu == device]) for device in devices) or "Not measured yet.\n"


def _table(rows: Sequence[Row]) -> str:
    title = f"**{rows[0].gpu}**, torch {rows[0].torch}" + (f", triton {rows[0].triton}" if rows[0].triton else "")
    return build_table(title, COLUMNS, [row.cells for row in rows], rows)


collect_files = collector("elementwise", Row, build_tables)


def main(arguments: Sequence[str]) -> None:
    write_files("bench.elementwise.tables", __doc__ or "", collect_files, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
