"""Which rungs a precision becomes on a device, what is left out, and what is refused."""

from typing import get_args

import pytest
import torch

from splitsam.common.metrics import Metrics
from splitsam.common.settings import SettingsProblem
from splitsam.encoder_service import optimize
from splitsam.encoder_service.calibration import Calibration, CalibrationReport, PrecisionFigures
from splitsam.encoder_service.optimize import RUNGS
from splitsam.encoder_service.precision import choose_precision, rungs_of
from splitsam.encoder_service.service import EncoderService
from splitsam.encoder_service.settings import EncoderSettings
from splitsam.v1 import types_pb2

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SPARSE = "fp32, bf16, int8, int8_sparse, seed"
MODEL_ID = "0123456789ab" + "f" * 52
PRECISIONS = [name for name in get_args(EncoderSettings.model_fields["precision"].annotation) if name != "auto"]


@pytest.fixture
def describe_gpu(monkeypatch: pytest.MonkeyPatch):
    """What PyTorch would say of a GPU that this machine need not have."""

    def describe(capability: tuple[int, int], cusparselt: bool = True, compiler: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: cusparselt)
        monkeypatch.setattr(optimize, "_has_compiler", lambda: compiler)

    return describe


def chosen(asked: str, device: torch.device) -> tuple[str, tuple[str, ...]]:
    choice = choose_precision(asked, device, MODEL_ID)
    return choice.precision, choice.rungs


def test_every_precision_has_a_name_on_the_wire():
    for name in PRECISIONS:
        assert types_pb2.Precision.Value(f"PRECISION_{name.upper()}")


def test_precisions_of_a_recent_gpu(describe_gpu):
    describe_gpu((9, 0))
    assert {name: chosen(name, GPU)[1] for name in PRECISIONS} == {
        "fp32": ("fp32",),
        "bf16": ("fp32", "bf16", "compile", "sdpa", "triton", "fused"),
        "fp8": (*RUNGS[:6], "fp8"),
        "int8": ("fp32", "bf16", "compile", "sdpa", "triton", "fused", "int8"),
        "int8_sparse": ("fp32", "bf16", "compile", "sdpa", "triton", "fused", "int8", "sparse_mlp"),
        "seed": RUNGS,
    }


def test_precisions_of_a_cpu():
    assert [chosen(name, CPU) for name in ("fp32", "bf16", "int8")] == [
        ("fp32", ("fp32",)),
        ("bf16", ("fp32", "bf16", "sdpa")),
        ("int8", ("fp32", "sdpa", "int8")),
    ]


@pytest.mark.parametrize("asked", ["seed", "int8_sparse", "fp8"])
def test_precision_that_a_cpu_cannot_do_is_refused_with_those_it_can(asked: str):
    line = rf"^precision: {asked} is not for cpu: .* needs? a CUDA GPU; it can do fp32, bf16, int8$"
    with pytest.raises(SettingsProblem, match=line):
        choose_precision(asked, CPU, MODEL_ID)


@pytest.mark.parametrize(
    ("capability", "cusparselt", "asked", "reason", "able"),
    [
        ((7, 5), True, "bf16", "needs compute capability 8.0, the GPU has 7.5", "fp32"),
        ((8, 0), False, "seed", "no cuSPARSELt", "fp32, bf16, int8"),
        ((8, 6), True, "fp8", "fp8 is not for cuda:0: it needs compute capability 8.9, the GPU has 8.6", SPARSE),
        ((8, 0), False, "int8_sparse", "no cuSPARSELt", "fp32, bf16, int8"),
    ],
)
def test_precision_that_a_gpu_cannot_do_is_refused(describe_gpu, capability, cusparselt, asked, reason, able):
    describe_gpu(capability, cusparselt)
    with pytest.raises(SettingsProblem, match=reason) as caught:
        choose_precision(asked, GPU, MODEL_ID)
    assert str(caught.value).endswith(f"it can do {able}")


def test_rungs_that_cannot_be_had_are_left_out_and_named(describe_gpu):
    describe_gpu((8, 0), compiler=False)
    choice = choose_precision("bf16", GPU, MODEL_ID)
    assert choice.rungs == ("fp32", "bf16", "sdpa", "fused")
    assert [note.partition(":")[0] for note in choice.notes] == [
        "bf16 runs without the rung compile",
        "bf16 runs without the rung triton",
    ]
    describe_gpu((9, 0), compiler=False)
    for asked in ("seed", "fp8"):
        with pytest.raises(SettingsProblem, match=rf"{asked} is not for cuda:0: there is no C\+\+ compiler"):
            choose_precision(asked, GPU, MODEL_ID)


def test_auto_takes_no_8_bits_without_a_calibration_report(describe_gpu):
    describe_gpu((9, 0))
    choice = choose_precision("auto", GPU, MODEL_ID)
    assert (choice.precision, choice.rungs) == ("bf16", RUNGS[:6])
    (note,) = choice.notes
    assert "fp8, int8, int8_sparse, seed" in note
    assert "no calibration report on model 0123456789ab" in note


@pytest.mark.parametrize(("device", "word"), [(CPU, "depends on the CPU"), (GPU, "compute capability")])
def test_auto_falls_back_to_fp32_and_says_why(describe_gpu, device: torch.device, word: str):
    describe_gpu((7, 0))
    choice = choose_precision("auto", device, MODEL_ID)
    assert (choice.precision, choice.rungs) == ("fp32", ("fp32",))
    assert word in choice.notes[0]


def test_precision_asked_for_without_a_calibration_report_is_noted():
    assert choose_precision("bf16", CPU, MODEL_ID).notes == ()
    assert "without a calibration report" in choose_precision("int8", CPU, MODEL_ID).notes[0]


def test_service_refuses_a_precision_before_it_loads_weights(tmp_path):
    settings = EncoderSettings.load(
        ["--precision", "seed", "--device", "cpu", "--checkpoint", str(tmp_path / "missing.pth")]
    )
    with pytest.raises(SettingsProblem, match="precision: seed is not for cpu"):
        EncoderService(settings, Metrics())


def calibrated(is_of_here: bool, bound: float = 0.99, **figures: tuple[float, float]) -> Calibration:
    """A report with the mean IoU and the milliseconds of some precisions as an H100 makes them."""
    precisions = {
        name: PrecisionFigures(
            rungs=rungs_of("cuda")[name],
            mask_miou=miou,
            broken_share=0,
            index_flips=0,
            ms_per_image={1: 100 - ms, 16: ms},
            peak_mib=100,
        )
        for name, (miou, ms) in {"fp32": (1.0, 9.0), **figures}.items()
    }
    report = CalibrationReport(
        model="vit_t",
        model_id=MODEL_ID,
        device="a GPU",
        torch="2.0",
        bound=bound,
        images=7,
        prompts=112,
        precisions=precisions,
        left_out={"seed": "the time limit left no time for it"},
    )
    return Calibration(report, "report.json", is_of_here)


def test_auto_takes_the_fastest_in_the_largest_batch_within_the_bound(describe_gpu):
    describe_gpu((9, 0))
    known = calibrated(True, bf16=(0.998, 2.0), int8=(0.991, 1.5), fp8=(0.98, 1.0))
    choice = choose_precision("auto", GPU, MODEL_ID, known)
    assert (choice.precision, choice.rungs) == ("int8", rungs_of("cuda")["int8"])
    first, *others = choice.notes
    assert first == (
        "auto chose int8 by report.json: 1.5 ms an image in batches of 16, the fastest of those whose masks keep a "
        "mean IoU of 0.99 with those of fp32; it keeps 0.9910 on 7 images."
    )
    assert others == [
        "auto passed over fp32: 9 ms an image in batches of 16.",
        "auto passed over bf16: 2 ms an image in batches of 16.",
        "auto passed over fp8: its masks keep 0.9800.",
        "auto passed over int8_sparse: the report has no figures of it as it is made here.",
        "auto passed over seed: the time limit left no time for it.",
    ]


def test_auto_takes_fp32_where_nothing_else_keeps_the_bound(describe_gpu):
    describe_gpu((9, 0))
    assert choose_precision("auto", GPU, MODEL_ID, calibrated(True, 1.0, bf16=(0.998, 2.0))).precision == "fp32"


def test_auto_takes_nothing_that_was_measured_with_other_rungs_or_cannot_be_done(describe_gpu):
    known = calibrated(True, bf16=(1.0, 5.0), int8=(1.0, 1.0), fp8=(1.0, 2.0))
    describe_gpu((9, 0), compiler=False)  # bf16 and int8 are left without two rungs, and fp8 cannot be had
    assert choose_precision("auto", GPU, MODEL_ID, known).precision == "fp32"
    describe_gpu((8, 0))
    assert choose_precision("auto", GPU, MODEL_ID, known).precision == "int8"


@pytest.mark.parametrize(("miou", "precision"), [(0.998, "bf16"), (0.97, "fp32")])
def test_of_a_report_from_elsewhere_masks_count_and_speeds_do_not(describe_gpu, miou: float, precision: str):
    describe_gpu((9, 0))
    choice = choose_precision("auto", GPU, MODEL_ID, calibrated(False, bf16=(miou, 2.0), int8=(1.0, 0.1)))
    assert choice.precision == precision
    said = " ".join(choice.notes)
    assert "report.json is of a GPU with torch 2.0, so its masks count and its speeds do not" in said
    assert ("the masks of bf16 keep a mean IoU of 0.9700" in said) == (precision == "fp32")


@pytest.mark.parametrize("is_of_here", [True, False])
def test_precision_asked_for_is_noted_with_what_the_report_says_of_its_masks(describe_gpu, is_of_here: bool):
    describe_gpu((9, 0))
    known = calibrated(is_of_here, bf16=(0.98, 2.0), int8=(0.995, 1.0))
    (below,) = choose_precision("bf16", GPU, MODEL_ID, known).notes
    assert below.startswith("bf16 is used although its masks keep a mean IoU of 0.9800")
    (within,) = choose_precision("int8", GPU, MODEL_ID, known).notes
    assert within == "int8 is used: its masks keep a mean IoU of 0.9950 with those of fp32 by report.json."
    (unknown,) = choose_precision("fp8", GPU, MODEL_ID, known).notes
    assert "without a calibration report" in unknown


def test_auto_without_a_report_says_how_to_make_one(describe_gpu):
    describe_gpu((9, 0))
    for device in (CPU, GPU):
        (note,) = choose_precision("auto", device, MODEL_ID, Calibration()).notes
        assert "`splitsam calibrate`" in note
    notes = choose_precision("bf16", GPU, MODEL_ID, Calibration(notes=("A report is damaged.",))).notes
    assert notes == ("A report is damaged.",)
