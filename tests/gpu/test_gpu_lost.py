"""A GPU's context that a kernel really poisoned: the guard says that the device is lost, and turns callers away."""

import subprocess
import sys
import textwrap

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
