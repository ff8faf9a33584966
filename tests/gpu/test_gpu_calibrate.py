"""`splitsam calibrate` on a GPU: speeds in every batch size, memory, masks, and what `auto` makes of the report."""

import subprocess
import sys
from pathlib import Path

import torch

from splitsam.encoder_service.calibration import find_calibration, name_device, read_report
from splitsam.encoder_service.precision import choose_precision, rungs_of

GPU = torch.device("cuda", 0)
PHOTOGRAPHS = Path(__file__).parents[2] / "training" / "photographs"
COMMAND = [sys.executable, "-c", "from splitsam.client.cli import main; main()", "calibrate", "--device", "cuda"]


def test_report_of_the_shipped_model_is_what_auto_chooses_by(tmp_path: Path):
    options = ["--precisions", "bf16,int8", "--batch-sizes", "1,4", "--max-images", "6", "--bound", "0.95"]
    subprocess.run([*COMMAND, "--images", PHOTOGRAPHS, "--cache-dir", tmp_path, *options], check=True)
    (path,) = (tmp_path / "calibration").iterdir()
    model_id = read_report(path).model_id
    found = find_calibration(model_id, GPU, rungs_of("cuda"), [path.parent])
    assert found.report is not None
    assert (found.is_of_here, found.report.device) == (True, name_device(GPU))
    assert list(found.report.precisions) == ["fp32", "bf16", "int8"]
    for figures in found.report.precisions.values():
        assert list(figures.ms_per_image) == [1, 4]
        assert figures.peak_mib is not None
        assert figures.peak_mib > 10
    assert found.report.precisions["bf16"].mask_miou > 0.95
    within = {name: figures.busy_ms for name, figures in found.report.precisions.items() if figures.mask_miou >= 0.95}
    assert choose_precision("auto", GPU, model_id, found).precision == min(within, key=within.__getitem__)
