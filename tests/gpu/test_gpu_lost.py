"""A GPU's context that a kernel really poisoned: the guard says that the device is lost, and turns callers away."""

import subprocess
import sys
import textwrap

import pytest

POISON = """
    import torch

    from splitsam.common.device_guard import DeviceGuard
    from splitsam.common.errors import NotReady
    from splitsam.common.metrics import Metrics

    gpu = torch.device("cuda", 0)
    guard = DeviceGuard(gpu, Metrics())

    def read_outside(items):
        table = torch.zeros(4, device=gpu)
        return table[torch.full((len(items),), 1_000, device=gpu)].tolist()

    def double(items):
        return (2 * torch.tensor(items, device=gpu)).tolist()

    assert guard.guarded(double)([1, 2]) == [2, 4]
    for run in (read_outside, double, double):
        try:
            guard.guarded(run)([1])
        except NotReady as problem:
            print(problem.retry_delay_s, guard.is_lost)
"""


def test_poisoned_context_loses_the_device_and_nobody_gets_an_answer():
    # In a process of its own: what happens to a context is for as long as its process lives.
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(POISON)], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.stdout.splitlines() == ["1.0 True"] * 3, run.stderr[-2000:]


IN_WORK = """
    import asyncio
    import gc
    import os

    import torch

    from splitsam.common.device_guard import DeviceGuard
    from splitsam.common.errors import NotReady
    from splitsam.common.metrics import Metrics
    from splitsam.common.transfers import Download, finish, finish_on_loop

    gpu = torch.device("cuda", 0)
    guard = DeviceGuard(gpu, Metrics())
    beside = torch.cuda.Stream(gpu)

    def read_outside(index):
        table = torch.zeros(4, device=gpu)
        table.record_stream(beside)
        sound = Download(table)
        yield sound
        read = Download(table[torch.full((4,), index, device=gpu)])
        yield read
        return read.tensors()[0].tolist()

    def run(index):
        return guard.guarded(lambda items: finish(read_outside(items[0]), gpu))([index])

    def run_on_loop(index):
        return asyncio.run(guard.guarded_on_loop(lambda items: finish_on_loop(read_outside(items[0]), gpu))([index]))

    print({name}(3))
    try:
        {name}(1_000)
    except NotReady:
        print(guard.is_lost)
    gc.collect()
    print("still here", flush=True)
    os._exit(3)  # as `run_service` ends
"""


@pytest.mark.parametrize("name", ["run", "run_on_loop"])
def test_buffers_in_work_when_the_device_is_lost_do_not_abort_the_process(name: str):
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(IN_WORK).replace("{name}", name)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.stdout.splitlines() == ["[0.0, 0.0, 0.0, 0.0]", "True", "still here"], run.stderr[-2000:]
    assert run.returncode == 3
