"""Times every rung of the ladder against unmodified `segment-anything`, and measures what it does to masks.

    python -m bench.waterfall --model vit_b --batches 1 4 16 32
    python -m bench.waterfall --model vit_b --batches 1 16 --scope end_to_end     # with `nested`, to masks
    python -m bench.waterfall --model vit_h --batches 8 --checkpoint sam_vit_h_4b8939.pth
    python -m bench.waterfall --model vit_t --batches 16 --image training/photographs/owl.jpg   # to prune on
    python -m bench.waterfall --model vit_b --batches 16 --rungs triton --trace out/triton.json --profile-top 20

A row is one rung, built on all rungs before it, at one batch; bench/README.md says how it is measured.
Rows go to `bench/results/waterfall-<gpu>.csv` as they come; `python -m bench.waterfall.tables` makes tables and
charts of them.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.machine import describe_machine, positive
from bench.pruning import Sources
from bench.row_file import RESULTS, ResultsFile, results_path
from bench.waterfall.measure import Options, Waterfall
from bench.waterfall.pipelines import LADDERS
from bench.waterfall.rows import Row
from bench.waterfall.subjects import draw_held_out, load_subject
from splitsam.common.architectures import ARCHITECTURES
from splitsam.common.device import choose_device
from splitsam.common.errors import CheckpointError
from splitsam.common.settings import SettingsProblem


def describe_row(row: Row) -> str:
    """One line for people."""

    def show(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return (
        f"{row.model} {row.weights} {row.scope} x{row.batch:<2} {row.rung:16} {row.ms_p50:9.3f} / {row.ms_p99:9.3f} ms "
        f"{row.img_s:8.2f} img/s  x{show(row.x_prev, '.2f')} of the last, x{row.x_fp32:.2f} of fp32  "
        f"{show(row.peak_mib, '.0f')} MiB  ready in {row.compile_s:.1f} s  error {row.embedding_error:.1e}  "
        f"masks {show(row.mask_miou, '.4f')}, {show(row.index_flips, 'd')} flips"
    )


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.waterfall", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every_rung = " ".join(LADDERS["end_to_end"])
    parser.add_argument("--model", choices=ARCHITECTURES, required=True)
    parser.add_argument("--batches", type=positive, nargs="+", default=[1, 4, 16], help="images in a forward pass")
    parser.add_argument("--rungs", nargs="+", help=f"rows to measure, each built on all before it: {every_rung}")
    parser.add_argument("--scope", choices=LADDERS, default="encoder")
    parser.add_argument("--checkpoint", help="trained weights: path or URL; otherwise vit_t's own, or random ones")
    parser.add_argument("--outliers", action="store_true", help="put outlier channels into the activations")
    parser.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        help="prune on this image, may be repeated; none: by magnitude",
    )
    parser.add_argument("--scenes", type=int, default=32, help="drawn scenes to compare masks on, trained weights only")
    parser.add_argument("--held-out", type=Path, default=Path("out/held_out.npz"), help="where drawn scenes are kept")
    parser.add_argument("--prompts", type=positive, default=8, help="end_to_end: clicks an image, on average")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV")
    parser.add_argument("--seconds", type=float, default=4.0, help="for timing a row, at most")
    parser.add_argument("--calls", type=positive, default=200, help="timed for a row, at most")
    parser.add_argument("--limit-seconds", type=float, default=math.inf, help="leave out rows that would end later")
    parser.add_argument("--trace", type=Path, help="write the last row's profiler trace here, for ui.perfetto.dev")
    parser.add_argument("--profile-top", type=int, default=0, help="print that many kernels of the last row")
    parser.add_argument("--commit", default="", help="what the CSV names, where there is no git")
    options = parser.parse_args(arguments)
    ladder = LADDERS[options.scope]
    for rung in options.rungs or ():
        if rung not in ladder:
            parser.error(
                f"argument --rungs: no rung of the scope {options.scope} is called {rung!r}: {' '.join(ladder)}"
            )
    options.rungs = [rung for rung in ladder if not options.rungs or rung in options.rungs]
    return options


def main(arguments: Sequence[str]) -> None:
    parsed = parse_arguments(arguments)
    try:
        device = choose_device(parsed.device)
        subject = load_subject(parsed.model, parsed.checkpoint, parsed.outliers)
        sources = Sources(subject.sam, parsed.image, device)
    except (SettingsProblem, CheckpointError) as problem:
        sys.exit(f"error: {problem}")
    start = time.monotonic()
    machine = describe_machine("bench.waterfall", device, parsed.commit, arguments)
    print(", ".join(f"{name} {value}" for name, value in machine.items() if value), flush=True)
    options = Options(
        scope=parsed.scope,
        batches=tuple(sorted(set(parsed.batches))),
        rungs=tuple(parsed.rungs),
        device=device,
        seconds=parsed.seconds,
        calls=parsed.calls,
        deadline=start + parsed.limit_seconds,
        prompts=parsed.prompts,
        trace=parsed.trace,
        profile_top=parsed.profile_top,
    )
    held = draw_held_out(parsed.scenes, parsed.held_out) if subject.trained and parsed.scenes > 0 else None
    path = results_path(parsed.results, "waterfall", machine["gpu"])
    measure(Waterfall(subject, sources, held, options, machine), ResultsFile(path, Row), options.batches)
    print(f"{path} after {time.monotonic() - start:.0f} s", flush=True)


def measure(waterfall: Waterfall, results: ResultsFile[Row], batches: Sequence[int]) -> list[Row]:
    """Prints and keeps each row as it comes. The one of segment-anything is kept only among those of its batch."""
    rows = []
    for row in waterfall.run():
        print(describe_row(row), flush=True)
        rows.append(row)
        if row.batch in batches:
            results.add(row)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
