"""Hurts a running deployment in every way that it must survive, and measures what its callers see.

    python -m bench.faults                             # all faults, some minutes
    python -m bench.faults --only redis-killed         # one of them

Rows go to `bench/results/faults-<device>.csv` as they come, each in place of an earlier one of its fault;
`python -m bench.faults.tables` makes a table of them. bench/README.md says how it is measured.
"""

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import redis
import torch

from bench.commit import read_commit
from bench.faults import redis_faults, replica_faults
from bench.faults.deployment import Deployment
from bench.faults.load import learn
from bench.faults.measure import Fault, measure
from bench.faults.rows import RESULTS, Row, add_row, results_path

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
    device = f"cpu-{torch.get_num_threads()}-cores"
    path = results_path(options.results, device)
    failed = []
    with Deployment(folder / "main", encoder_args=("--precision", "bf16")) as deployment:
        known = learn([each.address for each in deployment.encoders], [each.address for each in deployment.decoders])
        machine = {
            "device": device,
            "torch": torch.__version__,
            "redis": redis.Redis.from_url(deployment.redis.url).info("server")["redis_version"],
            "commit": read_commit(),
            "command": shlex.join(["python", "-m", "bench.faults", *arguments]),
        }
        for fault in FAULTS:
            if fault.name in options.only:
                row = measure(fault, deployment, known, machine)
                print(describe_row(row), flush=True)
                add_row(path, row, NAMES)
                if row.wrong_masks or row.hangs or row.crashes or row.normal_s > 10:
                    failed.append(fault.name)
    return failed


if __name__ == "__main__":
    main(sys.argv[1:])
