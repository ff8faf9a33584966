"""Calibration reports: what `splitsam calibrate` has found of a model's precisions, and where services find it.

    calibration-<model id>-<device>-torch-<version>-<rungs>.json

lies beside the weights or in the cache folder. Masks depend on weights and rungs; speeds on the device and torch, too.
So a report from elsewhere still tells which precisions keep masks, and nothing of which is the fastest.
"""

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

# The share of prompts with a mask below it is in the report: a mean hides the few that break.
BROKEN_IOU = 0.9
MAX_REPORT_BYTES = 2**20
_FOLDER = "calibration"

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_FROZEN = ConfigDict(frozen=True, extra="forbid")


class PrecisionFigures(BaseModel):
    """What one precision was found to do.

    Args:
        rungs: that made it.
        mask_miou: mean IoU of masks with those of fp32, same prompt and mask token.
        broken_share: of the prompts, with an IoU below BROKEN_IOU.
        index_flips: prompts for which another mask token than with fp32 was rated best.
        ms_per_image: of the encoder alone, median, by batch size.
        peak_mib: device memory; None on a CPU.
    """

    model_config = _FROZEN

    rungs: tuple[str, ...]
    mask_miou: Share
    broken_share: Share
    index_flips: Annotated[int, Field(ge=0)]
    ms_per_image: Annotated[dict[Annotated[int, Field(ge=1)], Positive], Field(min_length=1)]
    peak_mib: Positive | None

    @property
    def largest_batch(self) -> int:
        return max(self.ms_per_image)

    @property
    def busy_ms(self) -> float:
        """Milliseconds an image in the largest batch: what bounds a service under load."""
        return self.ms_per_image[self.largest_batch]


class CalibrationReport(BaseModel):
    """One run of `splitsam calibrate`.

    Args:
        device: as of `name_device`.
        bound: the least mask_miou of a precision that `auto` may take.
        precisions: those measured, fp32 first.
        left_out: the others that were asked for, and why.
    """

    model_config = _FROZEN

    version: Literal[1] = 1
    model: str
    model_id: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    device: str
    torch: str
    bound: Share
    images: Annotated[int, Field(ge=1)]
    prompts: Annotated[int, Field(ge=1)]
    precisions: dict[str, PrecisionFigures]
    left_out: dict[str, str]

    @model_validator(mode="after")
    def _fp32_is_the_reference(self) -> Self:
        fp32 = self.precisions.get("fp32")
        if fp32 is None or (fp32.rungs, fp32.mask_miou) != (("fp32",), 1):
            raise ValueError("has no figures of fp32 as the reference")
        return self


@dataclass(frozen=True)
class Calibration:
    """What a service knows of its model's precisions.

    Args:
        report: None where there is none.
        name: the report's file.
        is_of_here: it was made on such a device with this torch, so its speeds count.
        notes: files that cannot be used, one sentence each.
    """

    report: CalibrationReport | None = None
    name: str = ""
    is_of_here: bool = False
    notes: tuple[str, ...] = ()


def name_device(device: torch.device) -> str:
    """What speeds belong to: the GPU's name, or the CPU's kind and how many threads torch has there."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def name_report(model_id: str, device: torch.device, ladder: Mapping[str, Sequence[str]]) -> str:
    """The file's name.

    Args:
        ladder: the rungs of every precision of such devices, in this release.
    """
    rungs = hashlib.sha256(json.dumps(ladder, sort_keys=True).encode()).hexdigest()[:8]
    return f"{_prefix(model_id)}{_slug(name_device(device))}-torch-{_slug(torch.__version__)}-{rungs}.json"


def report_folders(weights: Path, cache_dir: Path) -> tuple[Path, ...]:
    """Where reports are looked for, in this order: beside the weights' file, and in the cache folder."""
    return weights.parent, cache_dir / _FOLDER


def find_calibration(
    model_id: str, device: torch.device, ladder: Mapping[str, Sequence[str]], folders: Sequence[Path]
) -> Calibration:
    """The report of a model on this device with this torch; without one the first, by name, from elsewhere.

    Args:
        ladder: as of `name_report`.
    """
    own = name_report(model_id, device, ladder)
    paths: list[Path] = []
    notes: tuple[str, ...] = ()
    for folder in folders:
        try:
            paths += _list_reports(folder, model_id)
        except OSError as error:
            notes += (f"Calibration reports cannot be looked for in {folder}: {error.strerror}.",)
    for path in sorted(paths, key=lambda path: path.name != own):
        try:
            report = read_report(path)
        except (OSError, ValueError) as error:
            notes += (f"The calibration report {path.name} cannot be used: {error}.",)
            continue
        if report.model_id == model_id:
            is_of_here = (report.device, report.torch) == (name_device(device), torch.__version__)
            return Calibration(report, path.name, is_of_here, notes)
    return Calibration(notes=notes)


def read_report(path: Path) -> CalibrationReport:
    """Read a report.

    Raises:
        OSError: it cannot be read.
        ValueError: it is none, or of another version; one line.
    """
    with path.open("rb") as file:
        data = file.read(MAX_REPORT_BYTES + 1)
    if len(data) > MAX_REPORT_BYTES:
        raise ValueError(f"it has more than {MAX_REPORT_BYTES} bytes")
    try:
        return CalibrationReport.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from None


def _list_reports(folder: Path, model_id: str) -> list[Path]:
    """In the order of their names; none where there is no such folder."""
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    return [folder / name for name in names if name.startswith(_prefix(model_id)) and name.endswith(".json")]


def _prefix(model_id: str) -> str:
    return f"calibration-{model_id[:12]}-"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
