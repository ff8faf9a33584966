"""Which numbers the image encoder computes in: the precision asked for, checked against the device and the model."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from splitsam.common.settings import SettingsProblem
from splitsam.encoder_service.calibration import Calibration, CalibrationReport, PrecisionFigures
from splitsam.encoder_service.optimize import FP8, RUNGS, SPARSE_MLP, unsupported

AUTO = "auto"
_TO_FUSED = RUNGS[: RUNGS.index("fused") + 1]
_TO_INT8 = RUNGS[: RUNGS.index("int8") + 1]
# fp32 stays the reference, untouched. A CPU leaves out what it has to compile for longer than it gains.
_ON_GPU: dict[str, tuple[str, ...]] = {
    "fp32": ("fp32",),
    "bf16": _TO_FUSED,
    "fp8": (*_TO_FUSED, FP8),
    "int8": _TO_INT8,
    "int8_sparse": (*_TO_INT8, SPARSE_MLP),
    "seed": RUNGS,
}
_ON_CPU: dict[str, tuple[str, ...]] = {
    "fp32": ("fp32",),
    "bf16": ("fp32", "bf16", "sdpa"),
    "int8": ("fp32", "sdpa", "int8"),
}
PRECISIONS = tuple(_ON_GPU)
# These change speed and memory; the others are what a precision is.
_OPTIONAL = ("compile", "sdpa", "triton", "fused")
_NEED_CALIBRATION = ("fp8", "int8", "int8_sparse", "seed")
_NONE = Calibration()


@dataclass(frozen=True)
class PrecisionChoice:
    """A precision that the device can do.

    Args:
        precision: what was asked for, `auto` resolved.
        rungs: that make it.
        notes: what was left out and why, one sentence each.
    """

    precision: str
    rungs: tuple[str, ...]
    notes: tuple[str, ...] = ()


def choose_precision(
    asked: str, device: torch.device, model_id: str, calibration: Calibration = _NONE
) -> PrecisionChoice:
    """Decide what a service computes in.

    Args:
        asked: fp32, bf16, fp8, int8, int8_sparse, seed, or auto: the fastest that is known to keep this model's masks.
        model_id: of the weights.
        calibration: what is known of them, see `find_calibration`.

    Raises:
        SettingsProblem: as `check_precision`.
    """
    check_precision(asked, device)
    known = _known_figures(device, calibration)
    if asked == AUTO:
        precision, notes = _choose(device, model_id, calibration, known)
    else:
        precision, notes = asked, _warn(asked, model_id, calibration, known)
    rungs, left_out = _usable_rungs(precision, device)
    return PrecisionChoice(precision, rungs, calibration.notes + notes + left_out)


def rungs_of(device_type: str) -> dict[str, tuple[str, ...]]:
    """The rungs of every precision that a kind of device can do: cuda, or any other."""
    return _ON_GPU if device_type == "cuda" else _ON_CPU


def check_precision(asked: str, device: torch.device) -> None:
    """Raises SettingsProblem, which names what the device can do instead, unless it can do this precision."""
    reason = None if asked == AUTO else refusal(asked, device)
    if reason is not None:
        able = [name for name in PRECISIONS if refusal(name, device) is None]
        raise SettingsProblem(f"precision: {asked} is not for {device}: {reason}; it can do {', '.join(able)}")


def refusal(precision: str, device: torch.device) -> str | None:
    """Why a device cannot do one of PRECISIONS, None if it can; `seed` is all of its rungs."""
    needed = [rung for rung in _ON_GPU[precision] if precision == "seed" or rung not in _OPTIONAL]
    return next((reason for rung in needed if (reason := unsupported(rung, device))), None)


def _usable_rungs(precision: str, device: torch.device) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The rungs of a precision that can be had, and a note on each of the others."""
    rungs, notes = [], []
    for rung in rungs_of(device.type)[precision]:
        reason = unsupported(rung, device)
        if reason is None:
            rungs.append(rung)
        else:
            notes.append(f"{precision} runs without the rung {rung}: {reason}.")
    return tuple(rungs), tuple(notes)


def _known_figures(device: torch.device, calibration: Calibration) -> dict[str, PrecisionFigures]:
    """What was measured of precisions as this device and this release make them."""
    measured = {} if calibration.report is None else calibration.report.precisions
    able = [name for name in PRECISIONS if name in measured and refusal(name, device) is None]
    return {name: measured[name] for name in able if measured[name].rungs == _usable_rungs(name, device)[0]}


def _choose(
    device: torch.device, model_id: str, calibration: Calibration, known: Mapping[str, PrecisionFigures]
) -> tuple[str, tuple[str, ...]]:
    report = calibration.report
    if report is None:
        return _choose_unmeasured(device, model_id)
    within = [name for name, figures in known.items() if figures.mask_miou >= report.bound]
    if not calibration.is_of_here:
        return _choose_by_masks(device, calibration.name, report, known)
    best = min(within, key=lambda name: known[name].busy_ms)
    figures = known[best]
    notes = [
        f"auto chose {best} by {calibration.name}: {_speed(figures)}, the fastest of those whose masks keep a mean "
        f"IoU of {report.bound:g} with those of fp32; it keeps {figures.mask_miou:.4f} on {report.images} images."
    ]
    for name in rungs_of(device.type):
        if name == best:
            continue
        if name not in known:
            reason = report.left_out.get(name) or "the report has no figures of it as it is made here"
        elif name in within:
            reason = _speed(known[name])
        else:
            reason = f"its masks keep {known[name].mask_miou:.4f}"
        notes.append(f"auto passed over {name}: {reason}.")
    return best, tuple(notes)


def _choose_unmeasured(device: torch.device, model_id: str) -> tuple[str, tuple[str, ...]]:
    """What is fast wherever it runs, and keeps the masks of the models that were looked at."""
    how = "`splitsam calibrate` makes a report by which auto chooses."
    if device.type != "cuda":
        return "fp32", (f"auto chose fp32: whether bf16 is faster depends on the CPU; {how}",)
    reason = refusal("bf16", device)
    if reason is not None:
        return "fp32", (f"auto chose fp32: bf16 is not for {device}: {reason}.",)
    skipped = ", ".join(_NEED_CALIBRATION)
    return "bf16", (f"auto chose bf16: for {skipped} there is no calibration report on model {model_id[:12]}; {how}",)


def _choose_by_masks(
    device: torch.device, name: str, report: CalibrationReport, known: Mapping[str, PrecisionFigures]
) -> tuple[str, tuple[str, ...]]:
    """By a report from elsewhere: nothing that needs one is taken, as its speed here is unknown, but bf16 may fall."""
    origin = (
        f"{name} is of {report.device} with torch {report.torch}, so its masks count and its speeds do not; "
        "`splitsam calibrate` makes a report of this device"
    )
    usual = "bf16" if device.type == "cuda" and refusal("bf16", device) is None else "fp32"
    if usual in known and known[usual].mask_miou < report.bound:
        found = f"the masks of {usual} keep a mean IoU of {known[usual].mask_miou:.4f} with those of fp32"
        return "fp32", (f"auto chose fp32: {found}, below {report.bound:g}.", f"The report {origin}.")
    return usual, (f"auto chose {usual}: the report {origin}.",)


def _speed(figures: PrecisionFigures) -> str:
    return f"{figures.busy_ms:.4g} ms an image in batches of {figures.largest_batch}"


def _warn(
    precision: str, model_id: str, calibration: Calibration, known: Mapping[str, PrecisionFigures]
) -> tuple[str, ...]:
    """Notes on a precision that was asked for by name."""
    report, figures = calibration.report, known.get(precision)
    if report is not None and figures is not None:
        found = f"its masks keep a mean IoU of {figures.mask_miou:.4f} with those of fp32 by {calibration.name}"
        if figures.mask_miou < report.bound:
            return (f"{precision} is used although {found}, below {report.bound:g}.",)
        return (f"{precision} is used: {found}.",) if precision in _NEED_CALIBRATION else ()
    if precision not in _NEED_CALIBRATION:
        return ()
    return (f"{precision} is used without a calibration report on model {model_id[:12]}: compare its masks with fp32.",)
