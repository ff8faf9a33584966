"""The rows of the waterfall: one rung of one model at one batch, and the CSV that keeps them."""

import csv
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

BASELINE = "segment-anything"
RESULTS = Path(__file__).parents[1] / "results"
Key = tuple[str, str, str, int, str]


@dataclass(frozen=True)
class Row:
    """One measured rung. None is a figure that does not exist there, an empty field in the CSV.

    Args:
        scope: `encoder` is pixels to embeddings, `end_to_end` goes on to the logits of every prompt.
        weights: `random`, `trained`, or either with `+outliers`.
        batch: images in one forward pass.
        ms_p50: of a batch, as is `ms_p99`.
        x_prev: throughput against the row before it at this batch and in the same run.
        x_fp32: throughput against unmodified segment-anything at batch 1, timed in the same run.
        peak_mib: most device memory in use while it ran, weights included; None on a CPU.
        compile_s: building it and its first answer at this batch, compilation and capture included.
        embedding_error: relative to fp32, root mean square over root mean square; the worst image of the batch.
        mask_miou: mean IoU of its masks with those of fp32, same prompt and same mask token; None without training.
        index_flips: prompts for which it rates another mask token best than fp32 does.
    """

    scope: str
    model: str
    weights: str
    batch: int
    rung: str
    ms_p50: float
    ms_p99: float
    img_s: float
    x_prev: float | None
    x_fp32: float
    peak_mib: float | None
    compile_s: float
    embedding_error: float
    mask_miou: float | None
    index_flips: int | None
    gpu: str
    torch: str
    triton: str
    commit: str
    command: str

    @property
    def key(self) -> Key:
        """What one run measures together and replaces together."""
        return self.scope, self.model, self.weights, self.batch, self.gpu


COLUMNS = tuple(column.name for column in fields(Row))


class ResultsFile:
    """The CSV of one GPU, rewritten with every row that is added.

    The first row of a key drops what earlier runs have left under that key: ratios compare within one run only.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begun: set[Key] = set()

    def add(self, row: Row) -> None:
        kept = read_rows(self._path) if self._path.exists() else []
        if row.key not in self._begun:
            kept = [other for other in kept if other.key != row.key]
            self._begun.add(row.key)
        write_rows(self._path, sorted([*kept, row], key=lambda row: row.key))


def read_rows(path: Path) -> list[Row]:
    """Raises ValueError when the file has other columns."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has not the columns {', '.join(COLUMNS)}")
        return [_parse(record) for record in reader]


def write_rows(path: Path, rows: list[Row]) -> None:
    """Never leaves half a file behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _format(value) for name, value in asdict(row).items()} for row in rows)
    os.replace(unfinished, path)


def _format(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _parse(record: dict[str, str]) -> Row:
    def number(name: str) -> float | None:
        return float(record[name]) if record[name] else None

    def required(name: str) -> float:
        return float(record[name])

    return Row(
        scope=record["scope"],
        model=record["model"],
        weights=record["weights"],
        batch=int(record["batch"]),
        rung=record["rung"],
        ms_p50=required("ms_p50"),
        ms_p99=required("ms_p99"),
        img_s=required("img_s"),
        x_prev=number("x_prev"),
        x_fp32=required("x_fp32"),
        peak_mib=number("peak_mib"),
        compile_s=required("compile_s"),
        embedding_error=required("embedding_error"),
        mask_miou=number("mask_miou"),
        index_flips=int(record["index_flips"]) if record["index_flips"] else None,
        gpu=record["gpu"],
        torch=record["torch"],
        triton=record["triton"],
        commit=record["commit"],
        command=record["command"],
    )
