"""Writes the waterfall's rows into the tables of the documents, and its charts beside the CSV.

    python -m bench.waterfall.tables             # README.md and bench/README.md
    python -m bench.waterfall.tables --check     # changes nothing; fails when something would change

`bench.documents` says how a document asks for them.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from bench.documents import collector, write_files
from bench.row_file import read_rows
from bench.waterfall.chart import draw_chart
from bench.waterfall.rows import BASELINE, Row
from splitsam.common.architectures import ARCHITECTURES
from splitsam.common.checkpoints import DEMONSTRATION_MODEL

SCOPES = {"encoder": "image encoder alone", "end_to_end": "image encoder and mask decoder"}
SLOWER = 0.99  # of the row before; within a percent is neither faster nor slower


def build_tables(rows: Sequence[Row]) -> str:
    """In Markdown, one table for each group."""
    return "\n".join(_table(group) for group in group_rows(rows)) or "Not measured yet.\n"


def group_rows(rows: Sequence[Row]) -> list[list[Row]]:
    """By GPU, scope, model, weights and what is pruned by; in each, batches ascend and rungs keep their order."""
    models = list(ARCHITECTURES)
    groups: dict[tuple[str, str, int, str, str, int], list[Row]] = {}
    for row in rows:
        place = models.index(row.model) if row.model in models else len(models)
        key = (row.gpu, row.scope, place, row.model, row.weights, row.pruning_images)
        groups.setdefault(key, []).append(row)
    return [sorted(group, key=lambda row: row.batch) for _, group in sorted(groups.items())]


def _table(rows: Sequence[Row]) -> str:
    first = rows[0]
    versions = sorted({f"torch {row.torch}" + (f", triton {row.triton}" if row.triton else "") for row in rows})
    on_gpu = any(row.peak_mib is not None for row in rows)
    on_masks = any(row.mask_miou is not None for row in rows)
    pruned = f"pruned on {first.pruning_images} images, " if first.pruning_images else ""
    columns = ["batch", "rung", "ms p50 / p99", "img/s", "x previous", "x fp32"]
    columns += ["peak MiB"] * on_gpu + ["ready s", "embedding error"] + ["mask mIoU", "index flips"] * on_masks
    lines = [
        f"**{first.model}, {SCOPES[first.scope]}**, {first.weights} weights{_reservation(first)}, "
        f"{pruned}{first.gpu}, {'; '.join(versions)}",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for row in rows:
        cells = [str(row.batch), row.rung, f"{row.ms_p50:.4g} / {row.ms_p99:.4g}", f"{row.img_s:.4g}"]
        cells += [_previous(row), f"{row.x_fp32:.2f}"]
        cells += [_cell(row.peak_mib, ".0f")] * on_gpu
        cells += [f"{row.compile_s:.1f}", f"{row.embedding_error:.1e}"]
        cells += [_cell(row.mask_miou, ".4f"), _cell(row.index_flips, "d")] * on_masks
        lines.append(f"| {' | '.join(cells)} |")
    runs = sorted({(row.command, row.commit) for row in rows})
    return "\n".join([*lines, "", *(f"`{command}` at {commit}  " for command, commit in runs)]) + "\n"


def _reservation(row: Row) -> str:
    """What the figures of a model cannot be taken for."""
    if row.model == DEMONSTRATION_MODEL:
        return " (the demonstration model)"
    return "" if row.weights.startswith("trained") else " (errors unverified on Meta's weights)"


def _previous(row: Row) -> str:
    """Bold where a rung loses."""
    if row.x_prev is None or row.rung == BASELINE:
        return ""
    return f"**{row.x_prev:.2f}**" if row.x_prev < SLOWER else f"{row.x_prev:.2f}"


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def build_charts(results: Path) -> dict[Path, str]:
    """The SVG of each CSV and scope: one panel a model, its weights left to one kind, which decides no time."""
    charts = {}
    for path in sorted(results.glob("waterfall-*.csv")):
        rows = read_rows(Row, path)
        for scope, title in SCOPES.items():
            panels: dict[str, list[Row]] = {}
            for group in group_rows([row for row in rows if row.scope == scope]):
                if not group[0].weights.endswith("+outliers") and not group[0].pruning_images:
                    panels[group[0].model] = group
            if panels:
                chart = draw_chart(panels, f"Images per second, {title}, {rows[0].gpu}")
                charts[path.with_name(f"{path.stem}-{scope.replace('_', '-')}.svg")] = chart
    return charts


def collect_files(documents: Sequence[Path], results: Path) -> dict[Path, str]:
    """What every document and chart should say."""
    return collector("waterfall", Row, build_tables)(documents, results) | build_charts(results)


def main(arguments: Sequence[str]) -> None:
    write_files("bench.waterfall.tables", __doc__, collect_files, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
