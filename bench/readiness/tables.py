"""Writes the readiness rows into the tables of the documents.

    python -m bench.readiness.tables             # README.md and bench/README.md
    python -m bench.readiness.tables --check     # changes nothing; fails when something would change

`bench.documents` says how a document asks for them.
"""

import sys
from collections.abc import Sequence

from bench.documents import build_table, collector, write_files
from bench.readiness.rows import Row

_COLUMNS = ("model", "precision", "batch sizes", "ready s, cold", "ready s, warm", "encodes ms, first / next")


def build_tables(rows: Sequence[Row]) -> str:
    """In Markdown, one table for each GPU; a line is a cold start and the warm one after it."""
    gpus = sorted({(row.gpu, row.torch, row.triton) for row in rows})
    return "\n".join(_table([row for row in rows if row.gpu == gpu]) for gpu, *_ in gpus) or "Not measured yet.\n"


def _table(rows: Sequence[Row]) -> str:
    first = rows[0]
    triton = f", triton {first.triton}" if first.triton else ""
    lines = []
    starts: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        starts.setdefault((row.model, row.precision, row.batch_sizes), {})[row.cache] = row
    for (model, precision, sizes), states in starts.items():
        ready = [f"{states[state].ready_s:.1f}" if state in states else "" for state in ("cold", "warm")]
        last = list(states.values())[-1]
        encodes = f"{last.first_encode_ms:.0f} / {last.second_encode_ms:.0f}"
        lines.append((model, precision, sizes, *ready, encodes))
    return build_table(f"**{first.gpu}**, torch {first.torch}{triton}", _COLUMNS, lines, rows)


collect_files = collector("readiness", Row, build_tables)


def main(arguments: Sequence[str]) -> None:
    write_files("bench.readiness.tables", __doc__ or "", collect_files, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
