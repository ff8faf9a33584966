"""Writes the encode rows into the tables of the documents.

    python -m bench.encode.tables             # README.md and bench/README.md
    python -m bench.encode.tables --check     # changes nothing; fails when something would change

`bench.documents` says how a document asks for them.
"""

import sys
from collections.abc import Sequence

from bench.documents import build_table, collector, write_files
from bench.encode.rows import Row, describe_memory

_COLUMNS = (
    "model",
    "precision",
    "batch sizes",
    "encoders",
    "serve-encoder",
    "clients",
    "img/s",
    "model alone",
    "share",
    "ms p50 / p90 / p99",
    "by stage, ms p50 / p99",
    "batch fill",
    "refused",
    "not stored",
    "cores: encoder / Redis / clients",
    "Redis SETs/s, MiB/s",
    "encoder MiB, first / last",
    "Redis MiB",
)


def build_tables(rows: Sequence[Row]) -> str:
    """In Markdown, one table for each machine; a line is one run."""
    machines = sorted({_machine(row) for row in rows})
    tables = [_table([row for row in rows if _machine(row) == machine]) for machine in machines]
    return "\n".join(tables) or "Not measured yet.\n"


def _machine(row: Row) -> tuple[str, str, str, int]:
    return row.gpu, row.torch, row.triton, row.cores


def _table(rows: Sequence[Row]) -> str:
    first = rows[0]
    triton = f", triton {first.triton}" if first.triton else ""
    title = f"**{first.gpu}**, {first.cores} CPU cores, torch {first.torch}{triton}"
    return build_table(title, _COLUMNS, map(_cells, rows), rows)


def _cells(row: Row) -> list[str]:
    return [
        row.model,
        row.precision,
        row.batch_sizes,
        str(row.encoders or 1),
        f"`{row.encoder_args}`" if row.encoder_args else "",
        f"{row.clients} in {row.generators}",
        f"{row.img_s:.4g}",
        f"{row.model_img_s:.4g}",
        f"{row.share:.1%}",
        _figures(row.ms_p50, row.ms_p90, row.ms_p99),
        row.stages,
        "" if row.fill is None else f"{row.fill:.2f}",
        row.refusals,
        str(row.not_stored or ""),
        f"{row.encoder_cores:.2f} / {row.redis_cores:.2f} / {row.clients_cores:.2f}",
        f"{row.redis_sets_s:.4g}, {row.redis_mib_s:.4g}",
        describe_memory(row.encoder_mib_first, row.encoder_mib_last),
        describe_memory(row.redis_mib_first, row.redis_mib_last),
    ]


def _figures(*values: float | None) -> str:
    return " / ".join("-" if value is None else f"{value:.4g}" for value in values)


collect_files = collector("encode", Row, build_tables)


def main(arguments: Sequence[str]) -> None:
    write_files("bench.encode.tables", __doc__ or "", collect_files, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
