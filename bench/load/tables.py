"""Writes the load generator's rows into the tables of the documents.

    python -m bench.load.tables             # README.md and bench/README.md
    python -m bench.load.tables --check     # changes nothing; fails when something would change

`bench.documents` says how a document asks for them.
"""

import sys
from collections.abc import Sequence

from bench.documents import collector, write_files
from bench.load.rows import ALLOWED_FACTOR, Row, allowed_ms

_COLUMNS = (
    "phase",
    "requests",
    "annotators",
    "offered / answered a second",
    "ms p50 / p90 / p99 / p99.9",
    "longest in queue, ms",
    "by stage, ms p50 / p99",
    "batch fill",
    "superseded",
    "refused",
    "refusal ms p50 / p99",
    "MiB",
    "sent late, ms p99",
    "busy cores",
)


def build_tables(rows: Sequence[Row]) -> str:
    """In Markdown, one table for each run."""
    runs: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        runs.setdefault((row.device, row.scenario, row.command), []).append(row)
    return "\n".join(_table(run) for _, run in sorted(runs.items())) or "Not measured yet.\n"


def _table(rows: Sequence[Row]) -> str:
    first = rows[0]
    lines = [
        f"**{first.scenario}**, {first.model}, {first.device}, torch {first.torch}, grpcio {first.grpcio}; "
        f"load average before: {first.load_before:.2g}",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        "|---" * len(_COLUMNS) + "|",
    ]
    lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    lines += [*_verdicts(rows), "", f"`{first.command}` at {first.commit}  "]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> list[str]:
    return [
        row.phase,
        row.kind,
        str(row.annotators),
        f"{row.offered_s:.3g} / {row.answered_s:.3g}",
        _figures(row.ms_p50, row.ms_p90, row.ms_p99, row.ms_p999),
        _figures(row.queue_ms_max),
        row.stages,
        "" if row.fill is None else f"{row.fill:.2f}",
        str(row.superseded or ""),
        row.refusals,
        _figures(row.refusal_ms_p50, row.refusal_ms_p99) if row.refused else "",
        f"{row.rss_mib:.0f}",
        _figures(row.sent_late_ms_p99),
        "-" if row.busy_cores is None else f"{row.busy_cores:.1f} of {row.cores}",
    ]


def _verdicts(rows: Sequence[Row]) -> list[str]:
    """What an overload was allowed, and what it took."""
    found = {(row.phase, row.kind): row for row in rows}
    lines = []
    for (phase, kind), row in found.items():
        calm, after = found.get(("unloaded", kind)), found.get(("recovery", kind))
        if phase != "overload" or calm is None or after is None:
            continue
        allowed = allowed_ms(calm, row)
        lines.append(
            f"- {kind}: accepted p99 {_figures(row.ms_p99)} ms of {_figures(allowed)} allowed ({ALLOWED_FACTOR} x the "
            f"unloaded p99, and the queue bound of {row.bound_ms}); {row.without_retry} of {row.refused} refused "
            f"without a time to return; {row.rss_mib - calm.rss_mib:+.0f} MiB; "
            f"as without load {after.normal_after_s:.1f} s after."
        )
    return ["", *lines] if lines else []


def _figures(*values: float | None) -> str:
    return " / ".join("-" if value is None else f"{value:.4g}" for value in values)


collect_files = collector("load", Row, build_tables)


def main(arguments: Sequence[str]) -> None:
    write_files("bench.load.tables", __doc__ or "", collect_files, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
