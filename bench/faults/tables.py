"""Writes the rows of the faults into the table of bench/README.md.

python -m bench.faults.tables             # writes
python -m bench.faults.tables --check     # changes nothing; fails when something would change
"""

import sys
from collections.abc import Sequence

from bench.documents import collector, write_files
from bench.faults.rows import Row

_HEAD = ("fault", "lasted s", "calls", "wrong masks", "hangs", "crashes", "library errors", "raw errors", "normal s")


def build_table(rows: Sequence[Row]) -> str:
    """In Markdown; what was not survived is bold."""
    if not rows:
        return "Not measured yet.\n"
    lines = [f"| {' | '.join(_HEAD)} |", "|---" * len(_HEAD) + "|"]
    for row in rows:
        name = row.fault if row.is_survived else f"**{row.fault}**"
        cells = [name, f"{row.fault_s:.1f}", str(row.calls), str(row.wrong_masks), str(row.hangs), str(row.crashes)]
        lines.append(f"| {' | '.join([*cells, row.library_errors, row.raw_errors, f'{row.normal_s:.1f}'])} |")
    where = sorted({f"{row.device}, torch {row.torch}, Redis {row.redis}" for row in rows})
    runs = sorted({f"`{row.command}` at {row.commit}  " for row in rows})
    return "\n".join([*lines, "", *where, "", *runs]) + "\n"


collect_files = collector("faults", Row, build_table)


def main(arguments: Sequence[str]) -> None:
    write_files("bench.faults.tables", str(__doc__), collect_files, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
