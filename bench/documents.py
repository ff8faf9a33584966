"""Tables between markers of a document, written by a command that can also check that they are current."""

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]


def replace_sections(document: str, name: str, build: Callable[[str], str]) -> str:
    """The document with new content between its markers of this name.

        <!-- name: filters -->
        <!-- end of name -->

    Args:
        build: from the filters of a marker to Markdown.
    """

    def section(match: re.Match[str]) -> str:
        filters = (match["filters"] or "").strip()
        head = f"{name}: {filters}" if filters else name
        return f"<!-- {head} -->\n\n{build(filters)}\n<!-- end of {name} -->\n"

    pattern = rf"<!-- {name}(?::(?P<filters>[^>]*))? ?-->\n.*?<!-- end of {name} -->\n"
    return re.sub(pattern, section, document, flags=re.S)


def write_or_check(files: Mapping[Path, str], check: bool, command: str) -> None:
    """Write what is not current, or only say so and exit with an error that names the command to run."""
    stale = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        print(f"{'not current' if check else 'wrote'}: {path}")
        if not check:
            path.write_text(files[path])
    if check and stale:
        sys.exit(f"error: run {command}")
