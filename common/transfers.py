"""Arrays between the host and a device, through pinned memory, with a wait only where the host reads.

Work for a device is written as a generator of the downloads that it needs before it can go on, and runs to its end on
a thread that blocks (`finish`) or on an event loop that does other things meanwhile (`finish_on_loop`).
"""

import asyncio
import time
from collections.abc import Generator, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# The device is done within this time as a rule; what takes longer is looked at in these intervals.
_SPIN_S = 0.002
_PAUSE_S = 0.0005
Result = TypeVar("Result")


def pinned(array: npt.NDArray[np.generic] | Tensor, device: torch.device) -> Tensor:
    """What is on the host, where a GPU copies from by itself; for a CPU as it is."""
    tensor = array if isinstance(array, Tensor) else torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def upload(array: npt.NDArray[np.generic] | Tensor, device: torch.device) -> Tensor:
    """A copy of what is on the host; nobody waits for it."""
    return pinned(array, device).to(device, non_blocking=True)


class Download:
    """Copies of tensors on their way to the host. On a CPU they are the tensors themselves."""

    def __init__(self, *tensors: Tensor):
        self._done: Any = None  # torch's own events lack types
        self._hosts: Sequence[Tensor] = tensors
        if tensors[0].device.type == "cuda":
            self._hosts = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
            for host, tensor in zip(self._hosts, tensors, strict=True):
                host.copy_(tensor, non_blocking=True)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def tensors(self) -> Sequence[Tensor]:
        """The copies, once they are there."""
        if self._done is not None:
            self._done.synchronize()
        return self._hosts

    def wait(self) -> list[npt.NDArray[Any]]:
        """The same as arrays."""
        return [host.numpy() for host in self.tensors()]

    async def arrival(self) -> None:
        """Returns once `tensors` would return at once."""
        start_s = time.perf_counter()
        # A thread that waits for the device and then wakes the loop would take longer than most batches.
        while self._done is not None and not self._done.query():  # noqa: ASYNC110
            await asyncio.sleep(0.0 if time.perf_counter() - start_s < _SPIN_S else _PAUSE_S)


Steps = Generator[Download, None, Result]


def finish(steps: Steps[Result], device: torch.device) -> Result:
    """The result of work on a device whose steps wait for downloads."""
    while True:
        try:
            _next_wait(steps, device).tensors()
        except StopIteration as end:
            result: Result = end.value
            return result


async def finish_on_loop(steps: Steps[Result], device: torch.device) -> Result:
    """As `finish`, on an event loop, whose other tasks run while the device works."""
    while True:
        try:
            awaited = _next_wait(steps, device)
        except StopIteration as end:
            result: Result = end.value
            return result
        await awaited.arrival()


def _next_wait(steps: Steps[Result], device: torch.device) -> Download:
    """Work up to the next download; StopIteration at the end."""
    # Triton launches on the current device, which is each thread's own and may be changed between two steps.
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return next(steps)
    with torch.cuda.device(device):
        return next(steps)
