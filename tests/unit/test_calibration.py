"""Calibration reports: which one a service finds, and what it makes of those that it cannot use."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from splitsam.encoder_service.calibration import (
    CalibrationReport,
    find_calibration,
    name_device,
    name_report,
    read_report,
)
from splitsam.encoder_service.precision import rungs_of

CPU = torch.device("cpu")
LADDER = rungs_of("cpu")
MODEL_ID = "0123456789ab" + "f" * 52
OWN_NAME = name_report(MODEL_ID, CPU, LADDER)
OTHER_NAME = f"calibration-{MODEL_ID[:12]}-another-gpu-torch-2.0-00000000.json"


def report_of(**changed: Any) -> CalibrationReport:
    figures = {"mask_miou": 1, "broken_share": 0, "index_flips": 0, "ms_per_image": {1: 9.5}, "peak_mib": None}
    fields: dict[str, Any] = {
        "model": "vit_t",
        "model_id": MODEL_ID,
        "device": name_device(CPU),
        "torch": torch.__version__,
        "bound": 0.99,
        "images": 2,
        "prompts": 32,
        "precisions": {"fp32": {"rungs": ("fp32",), **figures}},
        "left_out": {"fp8": "8-bit floats need a CUDA GPU"},
    }
    return CalibrationReport.model_validate(fields | changed)


def write(path: Path, report: CalibrationReport) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report.model_dump_json())


def test_report_reads_as_it_was_written(tmp_path: Path):
    write(tmp_path / OWN_NAME, report_of())
    assert read_report(tmp_path / OWN_NAME) == report_of()


def test_name_tells_models_torch_and_rungs_apart():
    assert OWN_NAME.startswith(f"calibration-{MODEL_ID[:12]}-")
    assert f"-torch-{torch.__version__.replace('+', '-')}-" in OWN_NAME
    assert name_report("e" * 64, CPU, LADDER) != OWN_NAME
    assert name_report(MODEL_ID, CPU, {**LADDER, "bf16": ("fp32", "bf16")}) != OWN_NAME


def test_no_report_is_no_news(tmp_path: Path):
    found = find_calibration(MODEL_ID, CPU, LADDER, (tmp_path, tmp_path / "absent"))
    assert (found.report, found.notes) == (None, ())


def test_report_of_this_device_goes_before_one_from_elsewhere(tmp_path: Path):
    write(tmp_path / "a" / OTHER_NAME, report_of(device="another GPU", torch="2.0"))
    elsewhere = find_calibration(MODEL_ID, CPU, LADDER, (tmp_path / "a", tmp_path / "b"))
    assert (elsewhere.name, elsewhere.is_of_here) == (OTHER_NAME, False)
    write(tmp_path / "b" / OWN_NAME, report_of())
    own = find_calibration(MODEL_ID, CPU, LADDER, (tmp_path / "a", tmp_path / "b"))
    assert (own.name, own.is_of_here, own.report) == (OWN_NAME, True, report_of())


@pytest.mark.parametrize("changed", [{"device": "another GPU"}, {"torch": "2.0"}])
def test_speeds_are_of_the_device_and_torch_inside_the_file_whatever_its_name(tmp_path: Path, changed):
    write(tmp_path / OWN_NAME, report_of(**changed))
    assert not find_calibration(MODEL_ID, CPU, LADDER, [tmp_path]).is_of_here


def test_report_of_another_model_is_passed_over_even_under_this_name(tmp_path: Path):
    write(tmp_path / OWN_NAME, report_of(model_id=MODEL_ID[:12] + "0" * 52))
    assert find_calibration(MODEL_ID, CPU, LADDER, [tmp_path]).report is None


def damaged(**changed: Any) -> bytes:
    return json.dumps(report_of().model_dump(mode="json") | changed).encode()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        pytest.param(b"", "Invalid JSON", id="empty"),
        pytest.param(b"\xff\xfe", "Invalid JSON", id="no text"),
        pytest.param(b"[" * 10_000, "Invalid JSON", id="deep"),
        pytest.param(b" " * 2**20 + b"{}", "more than 1048576 bytes", id="large"),
        pytest.param(damaged(version=2), "version: ", id="version"),
        pytest.param(damaged(bound=1.5), "bound: ", id="bound"),
        pytest.param(damaged(bound=float("nan")), "bound: ", id="nan"),
        pytest.param(damaged(model_id="f" * 63), "model_id: ", id="model id"),
        pytest.param(damaged(more=1), "more: ", id="another field"),
        pytest.param(damaged(precisions={}), "no figures of fp32", id="no reference"),
        pytest.param(damaged(precisions={"fp32": {"rungs": ["fp32"]}}), "precisions.fp32.mask_miou: ", id="no masks"),
    ],
)
def test_damaged_report_is_named_and_the_next_one_taken(tmp_path: Path, content: bytes, complaint: str):
    (tmp_path / OWN_NAME).write_bytes(content)
    write(tmp_path / OTHER_NAME, report_of())
    found = find_calibration(MODEL_ID, CPU, LADDER, [tmp_path])
    assert found.name == OTHER_NAME
    (note,) = found.notes
    assert OWN_NAME in note
    assert complaint in note
    assert "\n" not in note


def test_folder_that_cannot_be_searched_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    (note,) = find_calibration(MODEL_ID, CPU, LADDER, [tmp_path / "file"]).notes
    assert f"cannot be looked for in {tmp_path / 'file'}" in note
