"""Which numbers the image encoder computes in: the precision asked for, checked against the device and the model."""

from dataclasses import dataclass

import torch

from splitsam.common.settings import SettingsProblem
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
# These change speed and memory; the others are what a precision is.
_OPTIONAL = ("compile", "sdpa", "triton", "fused")
_NEED_CALIBRATION = ("fp8", "int8", "int8_sparse", "seed")


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


def choose_precision(asked: str, device: torch.device, model_id: str) -> PrecisionChoice:
    """Decide what a service computes in.

    Args:
        asked: fp32, bf16, fp8, int8, int8_sparse, seed, or auto: the fastest that is known to keep this model's masks.
        model_id: of the weights, by which a calibration report would be found.

    Raises:
        SettingsProblem: as `check_precision`.
    """
    check_precision(asked, device)
    if asked == AUTO:
        precision, notes = _choose(device, model_id)
    else:
        precision, notes = asked, _warn(asked, model_id)
    rungs = []
    for rung in rungs_of(device.type)[precision]:
        reason = unsupported(rung, device)
        if reason is None:
            rungs.append(rung)
        else:
            notes += (f"{precision} runs without the rung {rung}: {reason}.",)
    return PrecisionChoice(precision, tuple(rungs), notes)


def rungs_of(device_type: str) -> dict[str, tuple[str, ...]]:
    """The rungs of every precision that a kind of device can do: cuda, or any other."""
    return _ON_GPU if device_type == "cuda" else _ON_CPU


def check_precision(asked: str, device: torch.device) -> None:
    """Raises SettingsProblem, which names what the device can do instead, unless it can do this precision."""
    reason = None if asked == AUTO else _refusal(asked, device)
    if reason is not None:
        able = [name for name in _ON_GPU if _refusal(name, device) is None]
        raise SettingsProblem(f"precision: {asked} is not for {device}: {reason}; it can do {', '.join(able)}")


def _refusal(precision: str, device: torch.device) -> str | None:
    """Why a device cannot do a precision, None if it can; `seed` is all of its rungs."""
    needed = [rung for rung in _ON_GPU[precision] if precision == "seed" or rung not in _OPTIONAL]
    return next((reason for rung in needed if (reason := unsupported(rung, device))), None)


def _choose(device: torch.device, model_id: str) -> tuple[str, tuple[str, ...]]:
    if device.type != "cuda":
        return "fp32", ("auto chose fp32: whether bf16 is faster depends on the CPU, so it has to be asked for.",)
    reason = _refusal("bf16", device)
    if reason is not None:
        return "fp32", (f"auto chose fp32: bf16 is not for {device}: {reason}.",)
    skipped = ", ".join(_NEED_CALIBRATION)
    return "bf16", (f"auto chose bf16: for {skipped} there is no calibration report on model {model_id[:12]}.",)


def _warn(precision: str, model_id: str) -> tuple[str, ...]:
    if precision not in _NEED_CALIBRATION:
        return ()
    return (f"{precision} is used without a calibration report on model {model_id[:12]}: compare its masks with fp32.",)
