"""Simulated annotators on both services, open loop: requests leave when they are due, whatever became of those before.

    python -m bench.load --annotators 64 --clicks-per-s 8 --seconds 60
    python -m bench.load --overload 10 --seconds 120

Starts Redis and both services as processes of their own and stops them in the end. An annotator clicks, refines, and
sends the next image for encoding when the last one is begun; bench/README.md says how all is measured. Rows go to
`bench/results/load-<device>.csv`; `python -m bench.load.tables` makes tables of them.
"""

import argparse
import asyncio
import importlib.metadata
import os
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import torch

from bench.load.annotators import Habits, Kind
from bench.load.crowd import Place
from bench.load.rows import Environment, Row
from bench.load.scenarios import Run, run_overload, run_steady
from bench.machine import describe_machine
from bench.replicas import More, more_replicas
from bench.row_file import RESULTS, read_rows, results_path, write_rows
from splitsam.client.processes import StackError
from splitsam.client.stack import Stack, StackSettings
from splitsam.common.device import choose_device

IMAGE = Path(__file__).parents[2] / "client/assets/demo.jpg"


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--annotators", type=int, help="a steady crowd of so many")
    parser.add_argument(
        "--searches", type=int, default=0, help="repeat the steady crowd beside so many in everything mode"
    )
    size.add_argument("--overload", type=float, metavar="TIMES", help="a crowd for so many times the measured capacity")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the steady crowd or the overload")
    parser.add_argument("--calm-seconds", type=float, default=60.0, help="of the phases before and after an overload")
    parser.add_argument("--clicks-per-s", type=float, default=0.5, help="of one annotator, on average")
    parser.add_argument("--clicks-per-image", type=int, default=8)
    parser.add_argument("--click-queue-ms", type=int, default=1000, help="the decoder's longest wait for a batch")
    parser.add_argument("--encode-queue-ms", type=int, default=5000, help="the encoder's longest wait for a batch")
    parser.add_argument("--image", type=Path, default=IMAGE, help="a JPEG, sent as many different images")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--model", default="vit_t", help="of --checkpoint, for the record")
    parser.add_argument("--checkpoint", help="weights; otherwise the shipped vit_t")
    parser.add_argument("--encoders", type=int, default=1, help="processes, on one GPU if there is one")
    parser.add_argument("--decoders", type=int, default=1, help="as well")
    parser.add_argument("--generators", type=int, default=1, help="processes that send the crowd's requests")
    parser.add_argument(
        "--streams", action="store_true", help="an annotator clicks on a PredictMasksStream that stays open"
    )
    parser.add_argument("--redis-memory", default="1gb", help="from which on it evicts, as of its `maxmemory`")
    parser.add_argument("--encoder-arg", action="append", default=[], help="another argument of serve-encoder")
    parser.add_argument("--decoder-arg", action="append", default=[], help="another argument of serve-decoder")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV")
    parser.add_argument("--commit", default="", help="what the CSV names, where there is no git")
    return parser.parse_args(arguments)


def stack_settings(options: argparse.Namespace) -> StackSettings:
    shared = ["--device", options.device]
    shared += ["--checkpoint", options.checkpoint] if options.checkpoint else []
    return StackSettings(
        encoder_args=(*shared, "--max-queue-ms", str(options.encode_queue_ms), *options.encoder_arg),
        decoder_args=(*shared, "--max-queue-ms", str(options.click_queue_ms), *options.decoder_arg),
        redis_memory=options.redis_memory,
    ).on_free_ports()


def describe_environment(options: argparse.Namespace, arguments: Sequence[str]) -> Environment:
    device = choose_device(options.device)
    machine = describe_machine("bench.load", device, options.commit, arguments)
    return Environment(
        device=machine["gpu"] if device.type == "cuda" else f"cpu-{os.cpu_count()}-cores",
        model=options.model,
        load_before=os.getloadavg()[0],
        torch=torch.__version__,
        grpcio=importlib.metadata.version("grpcio"),
        commit=machine["commit"],
        command=machine["command"],
    )


def describe_row(row: Row) -> str:
    """One line for people."""

    def show(value: float | None) -> str:
        return "-" if value is None else f"{value:.0f}"

    latencies = " / ".join(map(show, (row.ms_p50, row.ms_p90, row.ms_p99, row.ms_p999)))
    text = (
        f"{row.phase:9} {row.kind:6} {row.annotators:5} annotators, {row.offered_s:7.2f} offered and "
        f"{row.answered_s:7.2f} answered a second, ms {latencies}, in the queue {show(row.queue_ms_max)} at most, "
        f"{row.rss_mib:.0f} MiB; {row.stages}; sent late by {show(row.sent_late_ms_p99)} ms at p99; "
        f"{row.busy_cores:.2f} of {row.cores} cores busy"
    )
    if row.superseded:
        text += f"; superseded {row.superseded}"
    if row.refused:
        refusal = f"{show(row.refusal_ms_p50)} / {show(row.refusal_ms_p99)}"
        text += f"; refused {row.refusals} in {refusal} ms, {row.without_retry} without a time to return"
    return text + (f"; normal after {row.normal_after_s:.1f} s" if row.normal_after_s is not None else "")


async def measure(
    options: argparse.Namespace, environment: Environment, stack: Stack, more: More
) -> AsyncIterator[Row]:
    habits = Habits(options.clicks_per_s, options.clicks_per_image)
    encoders = (stack.encoder, *(encoder.address for encoder in more["encoder"]))
    decoders = (stack.decoder, *(decoder.address for decoder in more["decoder"]))
    place = Place(encoders, decoders, options.image.read_bytes(), options.streams)
    bounds: dict[Kind, int] = {"encode": options.encode_queue_ms, "click": options.click_queue_ms}
    run = Run(stack, more, place, options.generators, habits, bounds, environment)
    rows = (
        run_overload(run, options.overload, options.seconds, options.calm_seconds)
        if options.overload
        else run_steady(run, options.annotators, options.seconds, options.searches)
    )
    async for row in rows:
        yield row


def keep(path: Path, rows: Sequence[Row]) -> None:
    """Put a run's rows in the place of those of the same scenario, model and crowd."""
    replaced = {(row.scenario, row.model, row.command) for row in rows}
    kept = read_rows(Row, path) if path.exists() else []
    kept = [row for row in kept if (row.scenario, row.model, row.command) not in replaced]
    write_rows(path, Row, [*kept, *rows])


async def collect(options: argparse.Namespace, environment: Environment, stack: Stack, more: More) -> list[Row]:
    rows = []
    async for row in measure(options, environment, stack, more):
        print(describe_row(row), flush=True)
        rows.append(row)
    return rows


def main(arguments: Sequence[str]) -> None:
    options = parse_arguments(arguments)
    environment = describe_environment(options, arguments)
    print(", ".join(f"{name} {value}" for name, value in vars(environment).items()), flush=True)
    try:
        with (
            Stack(stack_settings(options)) as stack,
            more_replicas(stack, encoders=options.encoders - 1, decoders=options.decoders - 1) as more,
        ):
            rows = asyncio.run(collect(options, environment, stack, more))
    except StackError as problem:
        sys.exit(f"error: {problem}\n" + "\n".join(problem.log_tail))
    path = results_path(options.results, "load", environment.device)
    keep(path, rows)
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
