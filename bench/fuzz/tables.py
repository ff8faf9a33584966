"""Writes the rows of the fuzzing into the table of bench/README.md.

python -m bench.fuzz.tables             # writes
python -m bench.fuzz.tables --check     # changes nothing; fails when something would change
"""

import sys
from collections.abc import Sequence

from bench.documents import collector, write_files
from bench.fuzz.rows import Row

_HEAD = ("target", "engine", "inputs", "seconds", "what became of them", "crashes", "peak MiB")


def build_table(rows: Sequence[Row]) -> str:
    """In Markdown; a target with a crash is bold."""
    if not rows:
        return "Not measured yet.\n"
    lines = [f"| {' | '.join(_HEAD)} |", "|---" * len(_HEAD) + "|"]
    for row in rows:
        name = f"**{row.target}**" if row.crashes else row.target
        cells = [name, row.engine, f"{row.inputs:,}", f"{row.seconds:.0f}", row.outcomes, str(row.crashes)]
        lines.append(f"| {' | '.join([*cells, f'{row.peak_mib:.0f}'])} |")
    lines.append(
        f"| all | | {sum(row.inputs for row in rows):,} | {sum(row.seconds for row in rows):.0f} | | "
        f"{sum(row.crashes for row in rows)} | |"
    )
    where = sorted({f"{row.device}, {row.versions}" for row in rows})
    runs = sorted({f"`{row.command}` at {row.commit}  " for row in rows})
    return "\n".join([*lines, "", *where, "", *runs]) + "\n"


collect_files = collector("fuzz", Row, build_table)


def main(arguments: Sequence[str]) -> None:
    write_files("bench.fuzz.tables", str(__doc__), collect_files, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
