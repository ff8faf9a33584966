"""Times, memory and profiles of calls on a device."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from splitsam.encoder_service.timing import synchronize, time_on_host

MIB = 2**20
LEAST_CALLS_ON_HOST = 3
PROFILED_CALLS = 3


def time_calls_on_host(call: Callable[[], object], device: torch.device, seconds: float, calls: int) -> list[float]:
    """As `time_calls`, by the host's clock: each call with all that it waits for, and three calls at least.

    Garbage is collected as in a service that is ready, which does not look through PyTorch's modules again: that takes
    longer than most calls.
    """
    first = time_on_host(call, device)
    count = min(calls, max(LEAST_CALLS_ON_HOST, int(1e3 * seconds / first)))
    gc.collect()
    gc.freeze()
    try:
        return [time_on_host(call, device) for _ in range(count)]
    finally:
        gc.unfreeze()


def measure_peak_mib(call: Callable[[], object], device: torch.device) -> float | None:
    """Most device memory allocated during a call; None on a CPU.

    What CUDA graphs keep for their own use counts in full: a replay allocates nothing that the allocator would see.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    segments: Any = torch.cuda.memory.memory_snapshot()  # type: ignore[no-untyped-call]  # torch's own lacks types
    private = [segment for segment in segments if tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0)]
    held = sum(segment["total_size"] - segment["allocated_size"] for segment in private)
    return float(torch.cuda.max_memory_allocated(device) + held) / MIB


def profile_calls(call: Callable[[], object], device: torch.device, trace: Path | None, top: int) -> str:
    """Profiles three calls: writes a trace that Perfetto opens, and returns a table of the `top` costliest kernels."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        for _ in range(PROFILED_CALLS):
            call()
        synchronize(device)
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
    order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    table: str = profiler.key_averages().table(sort_by=order, row_limit=top) if top else ""
    return table


class MemoryRecorder:
    """Records the CUDA allocator's doings from its creation until `write`; does nothing on a CPU.

    The snapshot opens at https://pytorch.org/memory_viz.
    """

    def __init__(self, device: torch.device, path: Path | None) -> None:
        self._path = path if device.type == "cuda" else None
        if self._path is not None:
            self._memory()._record_memory_history(max_entries=200_000)

    def write(self) -> None:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._memory()._dump_snapshot(str(self._path))
            self._memory()._record_memory_history(enabled=None)

    @staticmethod
    def _memory() -> Any:
        return torch.cuda.memory
