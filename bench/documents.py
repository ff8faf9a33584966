"""Tables in documents, written from results.

A document says where the tables of a benchmark go and which rows they hold, by columns of its CSV:

    <!-- waterfall: scope=encoder model=vit_b,vit_l batch=1,16 -->
    <!-- end of waterfall -->
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.commit import ROOT
from bench.row_file import RESULTS, Row, read_rows, select_rows

DOCUMENTS = (ROOT / "README.md", ROOT / "bench/README.md")


def write_sections(document: str, benchmark: str, build: Callable[[str], str]) -> str:
    """The document with new tables between its markers.

    Args:
        build: makes the tables, in Markdown, for a marker's filters.
    """
    pattern = re.compile(rf"<!-- {benchmark}:(?P<filters>[^>]*)-->\n.*?<!-- end of {benchmark} -->\n", re.S)

    def section(match: re.Match[str]) -> str:
        filters = match["filters"].strip()
        return f"<!-- {benchmark}: {filters} -->\n\n{build(filters)}\n<!-- end of {benchmark} -->\n"

    return pattern.sub(section, document)


def build_table(title: str, columns: Sequence[str], lines: Iterable[Sequence[str]], rows: Iterable[Any]) -> str:
    """A table in Markdown, under a title, with the commands below that its rows come from.

    Args:
        lines: cells, as many as columns.
        rows: of a benchmark, which keep their command and commit.
    """
    table = [" | ".join(columns), *(" | ".join(cells) for cells in lines)]
    heading, *body = (f"| {line} |" for line in table)
    commands = [f"`{command}` at {commit}  " for command, commit in sorted({(row.command, row.commit) for row in rows})]
    return "\n".join([title, "", heading, "|---" * len(columns) + "|", *body, "", *commands]) + "\n"


def collector(
    benchmark: str, kind: type[Row], build_tables: Callable[[Sequence[Row]], str]
) -> Callable[[Sequence[Path], Path], dict[Path, str]]:
    """For `write_files`: what documents say with the tables of a benchmark's rows, of all its CSVs."""

    def collect(documents: Sequence[Path], results: Path) -> dict[Path, str]:
        rows = [row for path in sorted(results.glob(f"{benchmark}-*.csv")) for row in read_rows(kind, path)]

        def build(filters: str) -> str:
            return build_tables(select_rows(kind, rows, filters))

        return {path: write_sections(path.read_text(), benchmark, build) for path in documents}

    return collect


def write_files(
    command: str, meaning: str, collect: Callable[[Sequence[Path], Path], dict[Path, str]], arguments: Sequence[str]
) -> None:
    """The command line of a benchmark's tables.

    Args:
        collect: what each file should say, from documents and the folder of the CSVs.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {command}", description=meaning, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("documents", nargs="*", type=Path, default=DOCUMENTS)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSVs")
    parser.add_argument("--check", action="store_true", help="only say what is not current")
    options = parser.parse_args(arguments)
    try:
        files = collect(options.documents, options.results)
    except (OSError, ValueError) as problem:
        sys.exit(f"error: {problem}")
    stale = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        print(f"{'not current' if options.check else 'wrote'}: {path}")
        if not options.check:
            path.write_text(files[path])
    if options.check and stale:
        sys.exit(f"error: run python -m {command}")
