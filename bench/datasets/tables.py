"""Writes the dataset rows into the tables of the documents.

    python -m bench.datasets.tables             # README.md and bench/README.md
    python -m bench.datasets.tables --check     # changes nothing; fails when something would change

`bench.documents` says how a document asks for them.
"""

import sys
from collections.abc import Sequence

from bench.datasets.rows import Row
from bench.documents import build_table, collector, write_files

_COLUMNS = (
    *("command", "images", "boxes", "seconds", "a second", "sent / files, KiB", "images / prompts in a batch"),
    *("reading images", "encoder model", "Redis", "decoder model", "writing masks"),
)
_ORDER = ("encode", "encode again", "export", "export again")


def build_tables(rows: Sequence[Row]) -> str:
    """In Markdown, one table for each device."""
    devices = sorted({row.gpu for row in rows})
    return "\n".join(_table([row for row in rows if row.gpu == device]) for device in devices) or "Not measured yet.\n"


def _table(rows: Sequence[Row]) -> str:
    first = rows[0]
    loads = ", ".join(f"{load:.1f}" for load in sorted({row.load_before for row in rows}))
    lines = []
    for row in sorted(rows, key=lambda row: _ORDER.index(row.scenario)):
        fills = " / ".join("" if fill is None else f"{fill:.2f}" for fill in (row.image_fill, row.prompt_fill))
        shares = (row.read_share, row.encoder_share, row.redis_share, row.decoder_share, row.write_share)
        cells = [
            *(row.scenario, str(row.images), str(row.boxes or ""), f"{row.seconds:.2f}", f"{row.per_s:.4g}"),
            *(f"{row.sent_kib:.0f} / {row.files_kib:.0f}", fills, *(f"{share:.0%}" for share in shares)),
        ]
        lines.append(cells)
    title = f"**{first.gpu}**, vit_t, torch {first.torch}; load average before: {loads}"
    return build_table(title, _COLUMNS, lines, rows)


collect_files = collector("datasets", Row, build_tables)


def main(arguments: Sequence[str]) -> None:
    write_files("bench.datasets.tables", __doc__ or "", collect_files, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
