"""Times the decoder on resident embeddings against unmodified `segment-anything`, and compares their masks.

    python -m bench.decoder
    python -m bench.decoder --scenarios click --seconds 20
    python -m bench.decoder --device cuda --limit-seconds 180 --log out/decoder.log

Embeddings are those of the shipped vit_t on photographs at 1080p. Every way of answering is checked against the masks
of segment-anything before it is timed; bench/README.md says what the scenarios are. Rows go to
`bench/results/decoder-<gpu>.csv` as they come.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.decoder.measure import SCENARIOS, Options, measure
from bench.decoder.rows import Row, describe_row
from bench.machine import describe_machine, positive
from bench.row_file import RESULTS, ResultsFile, results_path
from splitsam.common.device import choose_device
from splitsam.common.settings import SettingsProblem


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.decoder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), help="unset: fp32, on a GPU bf16 too")
    parser.add_argument("--images", type=positive, help="in a ragged batch; unset: 32 on a GPU, 2 on a CPU")
    parser.add_argument("--clicks", type=positive, help="on one of these, at most; unset: 40, on a CPU 4")
    parser.add_argument("--side", type=positive, help="points along everything's grid; unset: 32, on a CPU 4")
    parser.add_argument("--forward", type=positive, help="prompts in one forward pass; unset: 128, on a CPU 4")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV")
    parser.add_argument("--seconds", type=float, default=4.0, help="for timing a row, at most (three calls at least)")
    parser.add_argument("--calls", type=positive, default=1000, help="timed for a row, at most")
    parser.add_argument("--limit-seconds", type=float, default=math.inf, help="leave out rows that would end later")
    parser.add_argument("--log", type=Path, help="write what is printed here, too")
    parser.add_argument("--commit", default="", help="what the CSV names, where there is no git")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    parsed = parse_arguments(arguments)
    try:
        device = choose_device(parsed.device)
    except SettingsProblem as problem:
        sys.exit(f"error: {problem}")
    start = time.monotonic()
    machine = describe_machine("bench.decoder", device, parsed.commit, arguments)
    on_gpu = device.type == "cuda"
    options = Options(
        scenarios=tuple(scenario for scenario in SCENARIOS if scenario in parsed.scenarios),
        precisions=tuple(parsed.precisions or (("fp32", "bf16") if on_gpu else ("fp32",))),
        images=parsed.images or (32 if on_gpu else 2),
        clicks=parsed.clicks or (40 if on_gpu else 4),
        side=parsed.side or (32 if on_gpu else 4),
        forward=parsed.forward or (128 if on_gpu else 4),
        device=device,
        seconds=parsed.seconds,
        calls=parsed.calls,
        deadline=start + parsed.limit_seconds,
    )
    say = Log(parsed.log)
    say(", ".join(f"{name} {value}" for name, value in machine.items() if value))
    path = results_path(parsed.results, "decoder", machine["gpu"])
    results = ResultsFile(path, Row)
    with torch.inference_mode(False), torch.no_grad():
        for row in measure(options, machine, say):
            say(describe_row(row))
            results.add(row)
    say(f"{path.name} after {time.monotonic() - start:.0f} s")


class Log:
    """Prints lines, and keeps them in a file if there is one."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")

    def __call__(self, line: str) -> None:
        print(line, flush=True)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
