"""Hurts a running deployment in every way that it must survive, and measures what its callers see.

    python -m bench.faults                             # all faults, some minutes
    python -m bench.faults --only redis-killed         # one of them

Rows go to `bench/results/faults-<device>.csv` as they come, each in place of an earlier one of its fault;
`python -m bench.faults.tables` makes a table of them. bench/README.md says how it is measured.
"""

import argparse
import itertools
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.commit import read_commit
from bench.faults import redis_faults, replica_faults
from bench.faults.load import KnownImage, learn
from bench.faults.measure import Fault, measure
from bench.faults.rows import RESULTS, Row, add_row, results_path
from bench.faults.stages import Stage, behind_proxy, cluster, failing_device, sentinels, shifted_clock
from bench.faults.wall_clock import find_libfaketime
from splitsam.client.redis_server import find_redis_server

DAMAGES = ("delay", "reset", "truncate", "flip", "swap")
FAULTS = (
    Fault("redis-refused-at-start", redis_faults.refuse_redis_at_start),
    Fault("redis-stalled", redis_faults.stall_redis),
    Fault("redis-killed", redis_faults.kill_redis),
    Fault("redis-restarted-empty", redis_faults.restart_redis_empty, hold_s=0.0),
    Fault("redis-evicting", redis_faults.evict),
    Fault("redis-refusing-writes", redis_faults.refuse_writes),
    Fault("decoder-killed", replica_faults.kill(lambda deployment: deployment.decoders)),
    Fault("encoder-killed", replica_faults.kill(lambda deployment: deployment.encoders)),
    Fault("decoder-rolling-restart", replica_faults.roll(lambda deployment: deployment.decoders), hold_s=0.0),
    Fault("encoder-rolling-restart", replica_faults.roll(lambda deployment: deployment.encoders), hold_s=0.0),
    *(Fault(f"replies-{how}", redis_faults.damage_replies(how), behind_proxy) for how in DAMAGES),
    Fault("sentinel-failover", redis_faults.fail_over, sentinels),
    Fault("cluster-node-killed", redis_faults.kill_node, cluster),
    Fault("device-out-of-memory", replica_faults.run_out_of_memory, failing_device),
    Fault("device-lost", replica_faults.lose_device, failing_device),
    Fault("clock-forward-two-days", redis_faults.shift_clock(2 * 86_400), shifted_clock),
    Fault("clock-back-two-days", redis_faults.shift_clock(-2 * 86_400), shifted_clock),
)
NAMES = tuple(fault.name for fault in FAULTS)


def describe_row(row: Row) -> str:
    """One line for people."""
    return (
        f"{row.fault:26} {row.fault_s:5.1f} s, {row.calls:3} calls: {row.wrong_masks} wrong (IoU >= {row.least_iou}), "
        f"{row.hangs} hangs, {row.crashes} crashes, slowest {row.slowest_s:.1f} s, normal after {row.normal_s:.1f} s; "
        f"library: {row.library_errors or '-'}; raw: {row.raw_errors or '-'}"
    )


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=NAMES, nargs="+", default=NAMES, help="faults to measure")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV")
    parser.add_argument("--logs", type=Path, help="folder for the logs of all processes; removed when not given")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="splitsam-faults-") as temporary:
        failed = run(options, options.logs or Path(temporary), arguments)
    sys.exit(f"error: not survived: {', '.join(failed)}" if failed else 0)


def run(options: argparse.Namespace, folder: Path, arguments: Sequence[str]) -> list[str]:
    """Measure the faults asked for, stage by stage; the names of those that were not survived."""
    device = f"cpu-{torch.get_num_threads()}-cores"
    machine = {
        "device": device,
        "torch": torch.__version__,
        "redis": _redis_version(),
        "commit": read_commit(),
        "command": shlex.join(["python", "-m", "bench.faults", *arguments]),
    }
    failed: list[str] = []
    known: list[KnownImage] = []
    chosen = [fault for fault in FAULTS if fault.name in options.only]
    for stage, faults in itertools.groupby(chosen, key=lambda fault: fault.stage):
        if stage is shifted_clock and find_libfaketime() is None:
            print("left out without the package libfaketime: the clock")
            continue
        with stage(folder / faults_folder(chosen, stage)) as deployment:
            known = known or learn(
                [each.address for each in deployment.encoders], [each.address for each in deployment.decoders]
            )
            for fault in faults:
                row = measure(fault, deployment, known, machine)
                print(describe_row(row), flush=True)
                add_row(results_path(options.results, device), row, NAMES)
                if not row.is_survived:
                    failed.append(fault.name)
    return failed


def faults_folder(chosen: Sequence[Fault], stage: Stage) -> str:
    """Named after the first fault of a stage."""
    return next(fault.name for fault in chosen if fault.stage is stage)


def _redis_version() -> str:
    said = subprocess.run([find_redis_server(), "--version"], capture_output=True, text=True, check=True).stdout
    return said.partition("v=")[2].split()[0]


if __name__ == "__main__":
    main(sys.argv[1:])
