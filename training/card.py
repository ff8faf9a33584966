"""Write the figures of `results/evaluation*.json` into the tables of MODEL_CARD.md.

python -m training.card
"""

import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
CARD = FOLDER / "MODEL_CARD.md"
BEGIN, END = "<!-- figures: written by training.card -->\n", "<!-- end of figures -->\n"
FILES = ("evaluation.json", "evaluation_held_cutouts.json")
TITLES = {
    "photographs": "Photographs, masks drawn by hand",
    "drawn": "Drawn scenes from other seeds, silhouettes and textures, no file needed",
    "drawn_with_held_cutouts": "Drawn scenes with held-out cut-outs and photographs as well",
}
CLASSES = {
    "all": "all",
    "small": "small (< 1 % of the image)",
    "medium": "medium (1-10 %)",
    "large": "large (> 10 %)",
}
COLUMNS = {
    "click_oracle": "click, oracle",
    "click_predicted": "click, rated best",
    "click_corrected": "+1 click",
    "click_corrected_twice": "+2 clicks",
    "box_oracle": "box, oracle",
    "box_predicted": "box, rated best",
    "box_corrected": "box +1 click",
}


def build_tables(results: Path) -> str:
    """The tables of every evaluated set, in Markdown."""
    sets: dict[str, list[dict[str, Any]]] = {}
    commands = {}
    for record in (json.loads((results / name).read_text()) for name in FILES):
        for name, summary in record["sets"].items():
            if name not in sets:
                sets[name], commands[name] = summary, record["command"]
    parts = [_table(TITLES[name], commands[name], sets[name]) for name in TITLES if name in sets]
    return "\n".join(parts)


def write_tables(card: str, tables: str) -> str:
    """The card with new tables between its two markers."""
    return re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _match: f"{BEGIN}\n{tables}\n{END}", card, flags=re.S)


def _table(title: str, command: str, summary: list[dict[str, Any]]) -> str:
    lines = [f"**{title}** (`{command}`)", "", f"| objects | n | {' | '.join(COLUMNS.values())} |"]
    lines.append("|---" * (2 + len(COLUMNS)) + "|")
    for row in summary:
        figures = " | ".join(f"{row[column]:.3f}" for column in COLUMNS)
        lines.append(f"| {CLASSES[row['objects']]} | {row['count']} | {figures} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    CARD.write_text(write_tables(CARD.read_text(), build_tables(FOLDER / "results")))
