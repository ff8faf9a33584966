"""Times the attention kernels of the encoder against what PyTorch offers, each checked against float32 first.

    python -m bench.attention                  # one table, and bench/results/attention-<gpu>.csv
    python -m bench.attention --tune           # first choose the tiles of this GPU, and write them beside the table
    python -m bench.attention --quick          # batch 1 only
    python -m bench.attention.tables           # writes the rows into the table of bench/README.md

Inputs are random, in bfloat16. A time is the median over replays of a CUDA graph and is GPU time alone. TFLOP/s count
4 d per real query and key (196 keys in a window) whatever a variant computes beyond that. The SDPA variants are given
contiguous q, k, v, already partitioned and padded for windows, and a bias already built: what they leave out favours
them. "no bias" is another function, shown as the mark to beat. An error is relative to the float32 result, root mean
square over root mean square, on the first and the last image; a variant counts as right up to twice the error of
PyTorch's own bfloat16 route.
"""

import argparse
import itertools
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bench.attention.pytorch import sdpa_variants
from bench.attention.rows import Row
from bench.attention.timing import cases, measure, ours
from bench.attention.tune import tune
from bench.machine import describe_machine
from bench.row_file import RESULTS, results_path, write_rows

BATCHES = (1, 8, 16)


def table(batches: tuple[int, ...]) -> list[Row]:
    rows = []
    for case in cases(batches):
        variants = itertools.chain([ours(case, "this kernel", case.inputs.operator)], sdpa_variants(case))
        for variant in variants:
            rows.append(measure(case, variant))
            print(rows[-1].line(), flush=True)
    return rows


def driver_version() -> str:
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV and the tiles")
    parser.add_argument("--tune", action="store_true", help="choose the tiles of this GPU first")
    parser.add_argument("--quick", action="store_true", help="batch 1 only")
    parser.add_argument("--commit", default="", help="what the CSV names, where there is no git")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("error: this benchmark needs a GPU")
    start = time.monotonic()
    options.results.mkdir(parents=True, exist_ok=True)
    batches = BATCHES[:1] if options.quick else BATCHES
    device = torch.device("cuda", torch.cuda.current_device())
    machine = describe_machine("bench.attention", device, options.commit, arguments) | {"driver": driver_version()}
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    path = results_path(options.results, "attention", machine["gpu"])
    with torch.inference_mode():
        rows = tune(batches, options.results) if options.tune else []
        rows += table(batches)
    write_rows(path, Row, [replace(row, **machine) for row in rows])
    print(f"wrote {path} after {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
