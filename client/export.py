"""`splitsam export`: a mask for every annotation of a COCO file, in the background of people's clicks."""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from splitsam.client.client import Client
from splitsam.client.coco_file import read_content
from splitsam.client.export_file import write_export
from splitsam.client.export_pass import ExportOptions, ExportPass
from splitsam.client.export_plan import ExportPlan, make_plan
from splitsam.client.failures import AGAIN, Failure, exit_status
from splitsam.client.journal import Journal
from splitsam.client.results import DeploymentInfo

_FORMAT = "splitsam.export/1"
INTERRUPTED = 130
Described = dict[int, dict[str, Any] | None]


@dataclass
class ExportReport:
    """What became of `annotations` annotations.

    Args:
        masks: of them that have one now; `before` of these are of an earlier run.
        kept: of groups, as they were.
    """

    annotations: int
    masks: int
    before: int
    kept: int
    elapsed_s: float
    failures: list[Failure] = field(default_factory=list)

    @property
    def exit_status(self) -> int:
        """As of `exit_status`; done is what has a mask, or is kept."""
        return exit_status(self.failures)

    def __str__(self) -> str:
        rate = f"{self.elapsed_s:.1f} s, {(self.masks - self.before) / max(self.elapsed_s, 1e-9):.1f} masks/s"
        kept = f"; {self.kept} of groups are kept as they were" if self.kept else ""
        done = f"{self.masks} of {self.annotations} annotations have masks ({rate})"
        return f"{done}, {self.before} of them had before{kept}"


def run_export(
    client: Client, coco: Path, root: Path | None, out: Path, options: ExportOptions, report: Path | None = None
) -> int:
    """Make the masks, write them and say how it went, in a file as well if one is named; returns the exit status.

    Raises:
        DatasetError: the annotation file cannot be read.
        JournalError: what an earlier run has left does not belong to this one.
        SplitsamError: the services cannot be reached.
    """
    content, root = read_content(coco), root or coco.parent
    info = client.info()
    most_points = min(decoder.limits["max_points_per_prompt"] for decoder in info.decoders)
    plan = make_plan(content, root, coco.name, options.fields, max_points=most_points)
    with Journal(out.with_name(out.name + ".progress"), _FORMAT, _settings(coco, root, options, info)) as journal:
        try:
            result = export_all(client, plan, journal, options)
        except KeyboardInterrupt:
            print(f"interrupted: the same command goes on from {journal.path}", file=sys.stderr)
            return INTERRUPTED
        write_export(out, content, read_masks(journal) | {index: {} for index in plan.crowds})
        if result.exit_status != AGAIN:
            journal.path.unlink()
    print(result, flush=True)
    if report is not None:
        report.write_text(json.dumps(asdict(result), indent=2) + "\n")
    return result.exit_status


def export_all(client: Client, plan: ExportPlan, journal: Journal, options: ExportOptions) -> ExportReport:
    """Ask about all images that the journal does not have yet."""
    for failure in plan.failures:
        print(f"failed: {failure}", file=sys.stderr)
    before = read_masks(journal)
    with ExportPass(client, options, journal) as asking:
        asking.run([image for image in plan.images if image.tasks[0].index not in before])
    described = read_masks(journal)
    empty = [
        Failure(str(image.path), f"{task.place}: the mask is empty", is_final=True)
        for image in plan.images
        for task in image.tasks
        if described.get(task.index, {}) is None
    ]
    return ExportReport(
        annotations=plan.annotations,
        masks=_count(described),
        before=_count(before),
        kept=len(plan.crowds),
        elapsed_s=asking.elapsed_s,
        failures=[*plan.failures, *asking.failures, *empty],
    )


def read_masks(journal: Journal) -> Described:
    """What a journal knows of masks, by the annotation's index; None of one that is empty.

    Raises:
        JournalError: it is damaged.
    """
    described: Described = {}
    for number, line in journal.read():
        try:
            described.update((int(index), mask) for index, mask in line["masks"])
        except (TypeError, KeyError, ValueError) as error:
            raise journal.damaged(number) from error
    return described


def _count(described: Described) -> int:
    return sum(mask is not None for mask in described.values())


def _settings(coco: Path, root: Path, options: ExportOptions, info: DeploymentInfo) -> dict[str, Any]:
    """What masks depend on: all runs of one journal share it."""
    return {
        "annotations": hashlib.sha256(coco.read_bytes()).hexdigest(),
        "images": str(root.resolve()),
        "prompt": list(options.fields),
        "format": options.form,
        "selection": options.selection,
        "tolerance": options.tolerance_px,
        "model": sorted({decoder.model_id for decoder in info.decoders}),
    }
