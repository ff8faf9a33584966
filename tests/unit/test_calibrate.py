"""`splitsam calibrate` on real files and a small model, and the service that finds its report."""

import itertools
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from splitsam.client import cli
from splitsam.common.architectures import ARCHITECTURES, Architecture, build_sam
from splitsam.common.checkpoints import load_model
from splitsam.common.metrics import Metrics
from splitsam.encoder_service import calibrator, mask_reference
from splitsam.encoder_service.ahead_of_time import run_optimize
from splitsam.encoder_service.calibrate import choose_folder, read_images
from splitsam.encoder_service.calibration import CalibrationReport, name_device, read_report, report_folders
from splitsam.encoder_service.calibrator import CalibrationProblem, Calibrator
from splitsam.encoder_service.mask_reference import MaskReference, measure_iou
from splitsam.encoder_service.service import EncoderService
from splitsam.encoder_service.settings import EncoderSettings

CPU = torch.device("cpu")
SIDE = 2
PROMPTS = SIDE**2


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """One block and four prompts: all that a calibration goes through, in a fraction of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_reference, "POINTS_PER_SIDE", SIDE)
        patch.setattr(calibrator, "POINTS_PER_SIDE", SIDE)
        patch.setitem(ARCHITECTURES, "vit_t", Architecture("vit_t", width=192, depth=1, heads=3, global_blocks=()))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, and images beside files that are none."""
    folder = tmp_path_factory.mktemp("calibrate")
    torch.manual_seed(3)
    weights = build_sam(ARCHITECTURES["vit_t"]).state_dict()
    save_file(weights, folder / "weights.safetensors")
    images = folder / "images"
    images.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), np.uint8)
    Image.fromarray(pixels[0]).save(images / "a.png")
    Image.fromarray(pixels[1]).save(images / "c.jpg")
    (images / "b.png").write_bytes(b"no image")
    (images / "notes.txt").write_text("no image either")
    return folder


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["calibrate", *map(str, arguments)])
    return int(ended.value.code or 0)


def reports_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("calibration-*.json"))


@pytest.fixture(scope="module")
def calibrated(folder: Path) -> CalibrationReport:
    weights = folder / "weights.safetensors"
    status = run(
        *("--images", folder / "images", "--checkpoint", weights, "--device", "cpu"),
        *("--precisions", "bf16,fp8", "--bound", "0"),
    )
    assert status == 0
    (path,) = reports_in(folder)
    return read_report(path)


def test_report_says_what_was_measured_and_why_the_rest_was_not(calibrated: CalibrationReport, folder: Path):
    loaded = load_model(model=None, checkpoint=str(folder / "weights.safetensors"), sha256=None, cache_dir=folder)
    assert (calibrated.model, calibrated.model_id) == ("vit_t", loaded.model_id)
    assert (calibrated.device, calibrated.torch, calibrated.bound) == (name_device(CPU), torch.__version__, 0)
    assert (calibrated.images, calibrated.prompts) == (2, 2 * PROMPTS)
    assert list(calibrated.precisions) == ["fp32", "bf16"]
    bf16 = calibrated.precisions["bf16"]
    assert bf16.rungs == ("fp32", "bf16", "sdpa")
    assert 0 < bf16.mask_miou < 1
    assert (list(bf16.ms_per_image), bf16.peak_mib) == ([1], None)
    assert calibrated.left_out == {"fp8": "8-bit floats need a CUDA GPU"}


def test_service_takes_the_fastest_within_the_bound_and_says_so(calibrated: CalibrationReport, folder: Path):
    arguments = ["--precision", "auto", "--device", "cpu", "--checkpoint", str(folder / "weights.safetensors")]
    settings = EncoderSettings.load([*arguments, "--cache-dir", str(folder / "cache")])
    fastest = min(calibrated.precisions, key=lambda name: calibrated.precisions[name].busy_ms)
    _, info = EncoderService(settings, Metrics())._load()
    assert info.precision == fastest
    assert any(f"auto chose {fastest} by {reports_in(folder)[0].name}" in note for note in info.notes)
    assert any("auto passed over int8: the report has no figures" in note for note in info.notes)


def test_report_lies_beside_given_weights_and_else_in_the_cache(folder: Path):
    loaded = load_model(model=None, checkpoint=str(folder / "weights.safetensors"), sha256=None, cache_dir=folder)
    assert choose_folder(loaded, "weights.safetensors", folder / "cache") == folder
    assert choose_folder(loaded, None, folder / "cache") == folder / "cache" / "calibration"
    assert report_folders(loaded.path, folder / "cache") == (folder, folder / "cache" / "calibration")


def test_images_that_cannot_be_read_are_named_and_passed_over(folder: Path, capsys):
    files = sorted((folder / "images").iterdir())
    assert [image.image_size for image in read_images([*files, folder / "absent.png"], 9)] == [(64, 48)] * 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        f"skipped {folder / 'images' / name}" for name in ("b.png", "notes.txt")
    ] + [f"skipped {folder / 'absent.png'}"]


def test_more_images_than_wanted_are_thinned_out_evenly(tmp_path: Path):
    paths = [tmp_path / f"{width:02}.png" for width in range(1, 13)]
    for width, path in enumerate(paths, start=1):
        Image.new("RGB", (width, 1)).save(path)
    assert [image.image_size[0] for image in read_images(paths, 4)] == [1, 4, 7, 10]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--bound", "1.01"], "--bound takes a mean IoU from 0 to 1, not 1.01"),
        (["--bound", "nan"], "--bound takes a mean IoU from 0 to 1, not nan"),
        (["--precisions", "bf16,int4"], "--precisions takes any of fp32, bf16, .* not 'int4'"),
        (["--batch-sizes", "0"], "batch_sizes"),
        (["--device", "cuda:7"], "device: cuda:7 was asked for"),
        (["--checkpoint", "absent.pth"], "no checkpoint file at absent.pth"),
    ],
)
def test_option_that_cannot_be_used_is_one_line(folder: Path, tmp_path: Path, capsys, options, complaint: str):
    arguments = ["--images", folder / "images", "--checkpoint", folder / "weights.safetensors", "--device", "cpu"]
    assert run(*arguments, "--cache-dir", tmp_path, *options) == 1
    error = capsys.readouterr().err
    assert re.search(complaint, error)
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("names", "complaint"), [((), "no image is there"), (("x.jpg", "y.png"), "none of 2 can be read")]
)
def test_folder_without_images_is_one_line_and_leaves_no_report(folder: Path, tmp_path: Path, capsys, names, complaint):
    images = tmp_path / "images"
    images.mkdir()
    for name in names:
        (images / name).write_bytes(b"")
    weights = tmp_path / "weights.safetensors"
    weights.symlink_to(folder / "weights.safetensors")
    assert run("--images", images, "--checkpoint", weights, "--device", "cpu") == 1
    error = capsys.readouterr().err.splitlines()
    assert complaint in error[-1]
    assert len(error) == 1 + len(names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "weights.safetensors"]


def test_weights_that_are_optimised_already_are_refused(folder: Path, tmp_path: Path, capsys):
    out = tmp_path / "bf16.safetensors"
    run_optimize(
        model=None,
        checkpoint=str(folder / "weights.safetensors"),
        sha256=None,
        cache_dir=tmp_path,
        precision="bf16",
        device="cpu",
        out=out,
    )
    assert run("--images", folder / "images", "--checkpoint", out, "--device", "cpu") == 1
    assert "leaves no fp32 to compare with" in capsys.readouterr().err


def test_what_the_time_limit_leaves_no_time_for_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """A clock that goes on by a second whenever it is looked at: fp32 looks five times."""
    loaded = load_model(model=None, checkpoint=str(folder / "weights.safetensors"), sha256=None, cache_dir=folder)
    images = read_images([folder / "images" / "a.png"], 1)
    monkeypatch.setattr(calibrator, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    report = Calibrator(loaded, CPU, images, (1,), end_s=6).run(["bf16"], bound=0.99)
    assert list(report.precisions) == ["fp32"]
    assert report.left_out == {"bf16": "the time limit left no time for it"}
    with pytest.raises(CalibrationProblem, match=r"fp32, .* cannot be measured: the time limit"):
        Calibrator(loaded, CPU, images, (1,), end_s=0).run([], bound=0.99)


def test_weights_that_overflow_in_fp32_leave_nothing_to_compare_with(folder: Path):
    loaded = load_model(model=None, checkpoint=str(folder / "weights.safetensors"), sha256=None, cache_dir=folder)
    loaded.sam.image_encoder.patch_embed.proj.weight.fill_(1e38)
    images = read_images([folder / "images" / "a.png"], 1)
    problem = "fp32, .* cannot be measured: CheckpointError: the embedding of an empty image is not finite"
    with pytest.raises(CalibrationProblem, match=problem):
        Calibrator(loaded, CPU, images, (1,), time.monotonic() + 600).run([], bound=0.99)


def test_masks_are_compared_at_the_token_that_the_reference_rated_best(folder: Path):
    loaded = load_model(model=None, checkpoint=str(folder / "weights.safetensors"), sha256=None, cache_dir=folder)
    sam = loaded.sam
    size = (1024, 768)
    torch.manual_seed(1)
    first = torch.randn(256, 64, 64)
    second = first + 0.5 * torch.randn(256, 64, 64)
    reference = MaskReference(sam, CPU)
    reference.keep(first, size)
    same = reference.compare(0, first)
    assert (same.ious.tolist(), same.index_flips) == ([1.0] * PROMPTS, 0)
    places = [(column + 0.5) / SIDE for column in range(SIDE)]
    points = torch.tensor([(x * size[0], y * size[1]) for x in places for y in places])
    answers = []
    for embedding in (first, second):
        with torch.no_grad():
            sparse, dense = sam.prompt_encoder((points[:, None], torch.ones(PROMPTS, 1)), None, None)
            pe = sam.prompt_encoder.get_dense_pe()
            logits, scores = sam.mask_decoder(embedding[None], pe, sparse, dense, multimask_output=True)
            answers.append((sam.postprocess_masks(logits, size[::-1], size[::-1]) > 0, scores))
    tokens = answers[0][1].argmax(1)
    wanted, found = (masks[torch.arange(PROMPTS), tokens] for masks, _ in answers)
    compared = reference.compare(0, second)
    assert compared.ious.tolist() == pytest.approx(measure_iou(found, wanted).tolist(), abs=1e-4)
    assert compared.index_flips == int((answers[1][1].argmax(1) != tokens).sum())
    assert compared.ious.min() < 1
