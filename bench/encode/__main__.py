"""Times encoding from end to end, a JPEG of 1920 x 1080 in and its embedding in Redis, against the model alone.

    python -m bench.encode --model vit_b --precision bf16 --clients 64 --redis-memory 16gb
    python -m bench.encode --model vit_b --precision bf16 --encoder-arg=--decode-threads --encoder-arg=8

First times the model, then starts Redis and the services as processes of their own, and clients that send an image as
soon as the last one is answered, none of them twice; bench/README.md says how all is measured. Weights are random but
for vit_t's own. Rows go to `bench/results/encode-<device>.csv`; `python -m bench.encode.tables` makes tables of them.
"""

import argparse
import asyncio
import io
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from bench.decoder.scenes import draw_images
from bench.encode.measure import measure
from bench.encode.model import find_weights, time_model
from bench.encode.rows import Row, Setting, describe_memory, summarise
from bench.machine import describe_machine, positive
from bench.replicas import more_replicas
from bench.row_file import RESULTS, ResultsFile, results_path
from splitsam.client.processes import StackError
from splitsam.client.stack import Stack, StackSettings
from splitsam.common.architectures import ARCHITECTURES
from splitsam.common.device import choose_device
from splitsam.common.errors import StartProblem
from splitsam.encoder_service.precision import PRECISIONS, check_precision

_JPEG_QUALITY = 90


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.encode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=ARCHITECTURES, default="vit_t")
    parser.add_argument("--checkpoint", help="trained weights: path or URL; otherwise vit_t's own, or random ones")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--batch-sizes", type=positive, nargs="+", default=[1, 4, 16], help="on a GPU")
    parser.add_argument("--encoders", type=positive, default=1, help="processes, on one GPU if there is one")
    parser.add_argument("--clients", type=positive, default=64)
    parser.add_argument("--generators", type=positive, default=4, help="processes that the clients are spread over")
    parser.add_argument("--seconds", type=positive, default=20, help="that are measured, after a warm-up")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--redis-memory", default="1gb", help="from which on it evicts, as of its `maxmemory`")
    parser.add_argument("--encoder-arg", action="append", default=[], help="another argument of serve-encoder")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV")
    parser.add_argument("--commit", default="", help="what the CSV names, where there is no git")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, device: torch.device, machine: dict[str, str], folder: Path) -> Row:
    image = make_photograph()
    weights = find_weights(options.model, options.checkpoint, folder)
    batch = max(options.batch_sizes) if device.type == "cuda" else 1
    model_img_s = time_model(options.model, weights, options.precision, batch, device, image)
    print(f"the model alone: {model_img_s:.4g} img/s in batches of {batch}", flush=True)
    with (
        Stack(stack_settings(options, weights)) as stack,
        more_replicas(stack, encoders=options.encoders - 1) as more,
    ):
        outcomes, usage = asyncio.run(measure(stack, more, image, options.clients, options.generators, options.seconds))
    setting = Setting(
        model=options.model,
        precision=options.precision,
        batch_sizes=_with_commas(options.batch_sizes),
        encoders=options.encoders,
        encoder_args=" ".join(options.encoder_arg),
        clients=options.clients,
        generators=options.generators,
        seconds=options.seconds,
        cores=len(os.sched_getaffinity(0)),
    )
    return summarise(setting, batch, model_img_s, outcomes, usage, machine)


def make_photograph() -> bytes:
    """A JPEG of 1920 x 1080."""
    [pixels] = draw_images(1)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=_JPEG_QUALITY)
    return file.getvalue()


def stack_settings(options: argparse.Namespace, weights: str | None) -> StackSettings:
    shared = ("--checkpoint", weights) if weights else ()
    encoder = ("--device", options.device, "--precision", options.precision)
    encoder += ("--batch-sizes", _with_commas(options.batch_sizes), *options.encoder_arg)
    return StackSettings(
        encoder_args=(*shared, *encoder),
        decoder_args=(*shared, "--device", "cpu"),  # nobody calls it, and it would take memory of the GPU
        redis_memory=options.redis_memory,
    ).on_free_ports()


def describe_row(row: Row) -> str:
    """One line for people."""

    def show(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    latencies = " / ".join(map(show, (row.ms_p50, row.ms_p90, row.ms_p99)))
    return (
        f"{row.model} {row.precision}, {row.encoders} encoders, {row.clients} clients: {row.images} images in "
        f"{row.seconds:g} s, {row.img_s:.4g} img/s, {row.share:.1%} of the model's {row.model_img_s:.4g}; "
        f"ms {latencies}; {row.stages}; "
        f"{show(row.fill)} images in a batch; refused {row.refusals or 'none'}; not stored {row.not_stored}; "
        f"cores of {row.cores}: encoder {row.encoder_cores:.2f}, Redis {row.redis_cores:.2f}, clients "
        f"{row.clients_cores:.2f}; Redis {row.redis_sets_s:.4g} SETs and {row.redis_mib_s:.4g} MiB a second; "
        f"resident MiB, first / last: encoder {describe_memory(row.encoder_mib_first, row.encoder_mib_last)}, "
        f"Redis {describe_memory(row.redis_mib_first, row.redis_mib_last)}"
    )


def _with_commas(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def main(arguments: Sequence[str]) -> None:
    options = parse_arguments(arguments)
    try:
        device = choose_device(options.device)
        check_precision(options.precision, device)
        machine = describe_machine("bench.encode", device, options.commit, arguments)
        with tempfile.TemporaryDirectory() as folder:
            row = run(options, device, machine, Path(folder))
    except StartProblem as problem:
        sys.exit(f"error: {problem}")
    except StackError as problem:
        sys.exit(f"error: {problem}\n" + "\n".join(problem.log_tail))
    print(describe_row(row))
    path = results_path(options.results, "encode", row.gpu)
    ResultsFile(path, Row).add(row)
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
