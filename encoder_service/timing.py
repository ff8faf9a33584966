"""Times of calls on a device."""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

LEAST_CALLS = 5


def time_calls(call: Callable[[], object], device: torch.device, seconds: float, calls: int) -> list[float]:
    """Milliseconds of each of at most `calls` calls: as many as fit into `seconds`, or five if that is fewer.

    On a GPU each call lies between two CUDA events on a stream that is never empty, so launches that keep up cost
    nothing and launches that do not keep up are counted. On a CPU it is the host's clock.
    """
    first = time_on_host(call, device)
    count = min(calls, max(LEAST_CALLS, int(1e3 * seconds / first)))
    if device.type != "cuda":
        return [time_on_host(call, device) for _ in range(count)]
    new_event: Any = functools.partial(torch.cuda.Event, enable_timing=True)
    events = [(new_event(), new_event()) for _ in range(count)]
    for _ in range(2):
        call()
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in events]


def time_on_host(call: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
