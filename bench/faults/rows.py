"""The rows of the fault table, and the CSV that keeps them."""

import csv
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

NORMAL_LIMIT_S = 10.0
RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Row:
    """What callers saw of one fault.

    Args:
        fault_s: how long it lasted.
        calls: operations of the load, before, in and after it.
        wrong_masks: answers that are not those of the undisturbed run.
        least_iou: of any answer with that of the undisturbed run; None when none was answered.
        hangs: operations that went on after their deadline.
        crashes: processes that ended without being told to.
        library_errors: what the client library raised: reasons and how often.
        raw_errors: the same of calls through the stubs, which nothing sends again.
        slowest_s: the longest operation.
        normal_s: from the end of the fault until every replica is ready and the last failure is over.
    """

    fault: str
    fault_s: float
    calls: int
    wrong_masks: int
    least_iou: float | None
    hangs: int
    crashes: int
    library_errors: str
    raw_errors: str
    slowest_s: float
    normal_s: float
    device: str
    torch: str
    redis: str
    commit: str
    command: str

    @property
    def is_survived(self) -> bool:
        """No wrong mask, no hang, no crash, normal soon after, and no failed call where nothing may be noticed."""
        noticed = "rolling-restart" in self.fault and self.library_errors
        return not (self.wrong_masks or self.hangs or self.crashes or noticed) and self.normal_s <= NORMAL_LIMIT_S


COLUMNS = tuple(column.name for column in fields(Row))


def results_path(folder: Path, device: str) -> Path:
    return folder / f"faults-{device}.csv"


def read_rows(path: Path) -> list[Row]:
    """Raises ValueError when the file has other columns."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has other columns than {', '.join(COLUMNS)}")
        return [_parse(record) for record in reader]


def add_row(path: Path, row: Row, order: Iterable[str]) -> None:
    """Write a row in place of the one of the same fault; rows come in the order of the faults' names given."""
    rows = {each.fault: each for each in read_rows(path)} if path.exists() else {}
    rows[row.fault] = row
    places = {name: place for place, name in enumerate(order)}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for each in sorted(rows.values(), key=lambda row: places.get(row.fault, len(places))):
            writer.writerow({name: _format(value) for name, value in asdict(each).items()})
    os.replace(unfinished, path)


def _format(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _parse(record: dict[str, str]) -> Row:
    kinds: dict[str, type] = dict.fromkeys(("calls", "wrong_masks", "hangs", "crashes"), int)
    kinds |= dict.fromkeys(("fault_s", "least_iou", "slowest_s", "normal_s"), float)
    values = {name: kinds.get(name, str)(text) if text or name not in kinds else None for name, text in record.items()}
    return Row(**values)
