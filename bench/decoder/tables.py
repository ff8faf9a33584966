"""Writes the decoder's rows into the tables of the documents.

    python -m bench.decoder.tables             # README.md and bench/README.md
    python -m bench.decoder.tables --check     # changes nothing; fails when something would change

`bench.documents` says how a document asks for them.
"""

import sys
from collections.abc import Sequence

from bench.decoder.rows import Row
from bench.documents import build_table, collector, write_files

_COLUMNS = (
    *("scenario", "decoder", "images", "prompts", "ms p50 / p99", "prompts/s", "x of the original", "peak MiB"),
    *("mask mIoU", "flips", "masks"),
)


def build_tables(rows: Sequence[Row]) -> str:
    """In Markdown, one table for each device."""
    devices = sorted({(row.gpu, row.torch, row.triton) for row in rows})
    tables = [_table([row for row in rows if (row.gpu, row.torch, row.triton) == device]) for device in devices]
    return "\n".join(tables) or "Not measured yet.\n"


def _table(rows: Sequence[Row]) -> str:
    first = rows[0]
    triton = f", triton {first.triton}" if first.triton else ""
    lines = []
    for row in rows:
        cells = [row.scenario, row.decoder, str(row.images), str(row.prompts), f"{row.ms_p50:.4g} / {row.ms_p99:.4g}"]
        cells += [
            f"{row.prompts_s:.4g}",
            f"{row.x_original:.2f}",
            "" if row.peak_mib is None else f"{row.peak_mib:.0f}",
        ]
        cells += [f"{row.mask_miou:.4f}", "" if row.index_flips is None else str(row.index_flips), str(row.masks)]
        lines.append(cells)
    return build_table(f"**{first.gpu}**, torch {first.torch}{triton}", _COLUMNS, lines, rows)


collect_files = collector("decoder", Row, build_tables)


def main(arguments: Sequence[str]) -> None:
    write_files("bench.decoder.tables", __doc__ or "", collect_files, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
