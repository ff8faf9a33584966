"""Writes the rows of the attention benchmark into the tables of the documents.

    python -m bench.attention.tables             # README.md and bench/README.md
    python -m bench.attention.tables --check     # changes nothing; fails when something would change

`bench.documents` says how a document asks for them.
"""

import math
import sys
from collections.abc import Iterator, Sequence

from bench.attention.rows import Row
from bench.documents import build_table, collector, write_files

OURS = "this kernel"
# Variants of PyTorch's, and how a column calls them; those without a bias compute less.
_PYTORCH = {
    "cuDNN SDPA, dense bias": "cuDNN, dense bias",
    "mem-efficient SDPA, dense bias": "mem-efficient, dense bias",
    "cuDNN SDPA, no bias": "cuDNN, no bias",
    "flash SDPA, no bias": "flash, no bias",
}
_COLUMNS = ("attention", "batch", "ours, ms", "TFLOP/s", "error / PyTorch's", *_PYTORCH.values())


def build_tables(rows: Sequence[Row]) -> str:
    """In Markdown, one table for each GPU; a line is one layer at one batch, PyTorch's variants in ms."""
    gpus = sorted({row.gpu for row in rows})
    return "\n".join(_table([row for row in rows if row.gpu == gpu]) for gpu in gpus) or "Not measured yet.\n"


def _table(rows: Sequence[Row]) -> str:
    first = rows[0]
    title = f"**{first.gpu}**, torch {first.torch}, triton {first.triton}"
    return build_table(title, _COLUMNS, _lines(rows), rows)


def _lines(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    timed = {(row.model, row.kind, row.batch, row.variant): row for row in rows if row.ms is not None}
    for model, kind, batch, variant in timed:
        if variant != OURS:
            continue
        ours = timed[model, kind, batch, OURS]
        others = (timed.get((model, kind, batch, name)) for name in _PYTORCH)
        times = (f"{other.ms:.3f}" if other else "" for other in others)
        errors = f"{ours.error:.1e} / {(ours.allowed_error or math.nan) / 2:.1e}"
        yield f"{model}, {kind}", str(batch), f"{ours.ms:.3f}", f"{ours.tflops:.0f}", errors, *times


collect_files = collector("attention", Row, build_tables)


def main(arguments: Sequence[str]) -> None:
    write_files("bench.attention.tables", __doc__ or "", collect_files, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
