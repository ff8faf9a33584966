"""Writes the rows of the faults into the table of bench/README.md.

python -m bench.faults.tables             # writes
python -m bench.faults.tables --check     # changes nothing; fails when something would change
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from bench.documents import write_files, write_sections
from bench.faults.rows import Row, read_rows

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


def collect_files(documents: Sequence[Path], results: Path) -> dict[Path, str]:
    """What every document should say."""
    rows = [row for path in sorted(results.glob("faults-*.csv")) for row in read_rows(path)]
    return {path: write_sections(path.read_text(), "faults", lambda _filters: build_table(rows)) for path in documents}


def main(arguments: Sequence[str]) -> None:
    write_files("bench.faults.tables", str(__doc__), collect_files, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
