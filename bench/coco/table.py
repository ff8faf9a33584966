"""The table of `bench.coco`: means over objects, by rung and by COCO's classes of size."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from bench.coco.scores import Score

SIZE_CLASSES = (("small", 32.0**2), ("medium", 96.0**2), ("large", float("inf")))


@dataclass(frozen=True)
class Line:
    """One line of the table: means over the objects of a size class with a rung.

    `built` are the rungs in the encoder, joined by +.
    """

    rung: str
    built: str
    objects: str
    count: int
    own_choice: float
    fp32_choice: float
    oracle: float
    vs_fp32: float
    flips: int


def summarise(rung: str, built: Sequence[str], scores: Sequence[Score]) -> list[Line]:
    """Means over all objects, then over each class of size that has any."""
    groups = [("all", list(scores))]
    low = 0.0
    for name, high in SIZE_CLASSES:
        groups.append((name, [score for score in scores if low <= score.area_px < high]))
        low = high
    return [
        Line(
            rung=rung,
            built="+".join(built),
            objects=name,
            count=len(group),
            own_choice=float(np.mean([score.own_choice for score in group])),
            fp32_choice=float(np.mean([score.fp32_choice for score in group])),
            oracle=float(np.mean([score.oracle for score in group])),
            vs_fp32=float(np.mean([score.vs_fp32 for score in group])),
            flips=sum(score.flipped for score in group),
        )
        for name, group in groups
        if group
    ]


def print_table(lines: Sequence[Line]) -> None:
    print(
        f"{'rung':10} {'objects':8} {'n':>6} {'own choice':>11} {'fp32 choice':>11} {'oracle':>8} {'vs fp32':>8} flips"
    )
    for line in lines:
        print(
            f"{line.rung:10} {line.objects:8} {line.count:6d} {line.own_choice:11.4f} {line.fp32_choice:11.4f} "
            f"{line.oracle:8.4f} {line.vs_fp32:8.4f} {line.flips:5d}"
        )


def write_table(path: Path, lines: Sequence[Line], environment: Mapping[str, str]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*(f.name for f in fields(Line)), *environment], lineterminator="\n")
        writer.writeheader()
        for line in lines:
            figures = {name: round(x, 5) if isinstance(x, float) else x for name, x in asdict(line).items()}
            writer.writerow({**figures, **environment})
