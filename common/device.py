"""Which device a service computes on."""

import torch

from splitsam.common.settings import SettingsProblem


def choose_device(wanted: str) -> torch.device:
    """The device for `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        SettingsProblem: a CUDA device was asked for and there is none of that number.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        wanted = "cuda:0" if available else "cpu"
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= available:
        raise SettingsProblem(f"device: {wanted} was asked for and this machine has {available} CUDA devices")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def describe_device(device: torch.device) -> str:
    """For people: `cpu`, or a CUDA device with its name."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "cpu"
