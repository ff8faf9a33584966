"""Writes the loop benchmark's rows into the tables of the documents.

    python -m bench.loop.tables             # README.md and bench/README.md
    python -m bench.loop.tables --check     # changes nothing; fails when something would change

`bench.documents` says how a document asks for them.
"""

import sys
from collections.abc import Sequence

from bench.documents import build_table, collector, write_files
from bench.loop.rows import Row

_COLUMNS = (
    "what",
    "by",
    "clicks a second, sent / answered",
    "event loop, ms a click",
    "process, ms a click",
    "loop busy",
    "ms p50 / p99, no latency of a click",
    "unanswered",
    "load before",
)


def build_tables(rows: Sequence[Row]) -> str:
    """In Markdown, one table for each device; a line is one rate in one way."""
    devices = sorted({row.gpu for row in rows})
    return "\n".join(_table([row for row in rows if row.gpu == device]) for device in devices) or "Not measured yet.\n"


def _table(rows: Sequence[Row]) -> str:
    first = rows[0]
    title = f"**The decoder service {first.subject}**, {first.gpu}, torch {first.torch}, grpcio {first.grpcio}"
    return build_table(title, _COLUMNS, map(_cells, rows), rows)


def _cells(row: Row) -> list[str]:
    return [
        f"{row.subject}, {row.wait_ms:g} ms in its place",
        row.way,
        f"{row.rate_s:g} / {row.answered_s:.4g}",
        _figure(row.loop_ms),
        _figure(row.process_ms),
        f"{row.loop_share:.0%}",
        f"{_figure(row.ms_p50)} / {_figure(row.ms_p99)}",
        row.unanswered,
        f"{row.load_before:.2g}",
    ]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


collect_files = collector("loop", Row, build_tables)


def main(arguments: Sequence[str]) -> None:
    write_files("bench.loop.tables", __doc__ or "", collect_files, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
