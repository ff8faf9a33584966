"""Arrays between the host and a device, through pinned memory, with a wait only where the host reads."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def upload(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """A copy on the device; the host does not wait for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Download:
    """Copies of tensors on their way to the host. On a CPU they are the tensors themselves."""

    def __init__(self, *tensors: Tensor):
        self._done: torch.cuda.Event | None = None
        self._hosts: Sequence[Tensor] = tensors
        if tensors[0].device.type == "cuda":
            self._hosts = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
            for host, tensor in zip(self._hosts, tensors, strict=True):
                host.copy_(tensor, non_blocking=True)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's own lacks types
            self._done.record()

    def wait(self) -> list[npt.NDArray[Any]]:
        """The arrays, once they are there."""
        if self._done is not None:
            self._done.synchronize()
        return [host.numpy() for host in self._hosts]
