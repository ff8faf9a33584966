"""Writes the rows of the faults into the table of bench/README.md.

python -m bench.faults.tables             # writes
python -m bench.faults.tables --check     # changes nothing; fails when something would change
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.documents import ROOT, replace_sections, write_or_check
from bench.faults.rows import RESULTS, Row, read_rows

DOCUMENTS = (ROOT / "bench/README.md",)
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


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.faults.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("documents", nargs="*", type=Path, default=DOCUMENTS)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSVs")
    parser.add_argument("--check", action="store_true", help="only say what is not current")
    options = parser.parse_args(arguments)
    try:
        rows = [row for path in sorted(options.results.glob("faults-*.csv")) for row in read_rows(path)]
        files = {
            path: replace_sections(path.read_text(), "faults", lambda _filters: build_table(rows))
            for path in options.documents
        }
    except (OSError, ValueError) as problem:
        sys.exit(f"error: {problem}")
    write_or_check(files, options.check, "python -m bench.faults.tables")


if __name__ == "__main__":
    main(sys.argv[1:])
