"""What a click costs the decoder's event loop, WITHOUT THE MODEL: of the service around it, by calls and on streams.

    python -m bench.loop --rates 300 450 750

Starts Redis and a decoder service whose model is replaced by a wait (`bench.loop.decoder`), and clicks at each rate, by
calls and then on streams. Processes, gRPC, Redis and everything else are real; the milliseconds are those of the
service and of the wait, and never to be quoted as a click's latency: `bench.load` measures that. Linux only. Rows go to
`bench/results/loop-<device>.csv`; `python -m bench.loop.tables` makes a table of them.
"""

import argparse
import asyncio
import contextlib
import importlib.metadata
import itertools
import os
import secrets
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

from bench.faults.deployment import RedisServer, Replica
from bench.load.watch import cpu_seconds
from bench.loop.annotators import Annotators, store_images
from bench.loop.decoder import WAIT_MS
from bench.loop.rows import CALLS, STREAMS, WITHOUT_THE_MODEL, Row, Setting, Usage, describe_row, summarise
from bench.machine import describe_machine, positive
from bench.row_file import RESULTS, ResultsFile, results_path
from splitsam.common.device import choose_device

# As a GPU's decoder takes prompts.
_BATCH_PROMPTS = "256"


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.loop", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rates", type=positive, nargs="+", default=[300], help="clicks a second")
    parser.add_argument("--wait-ms", type=positive, default=8, help="of every batch, in the model's place")
    parser.add_argument("--seconds", type=positive, default=20, help="of each rate in each way")
    parser.add_argument("--annotators", type=positive, default=64, help="who click in turn")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV")
    parser.add_argument("--commit", default="", help="what the CSV names, where there is no git")
    return parser.parse_args(arguments)


async def measure(
    options: argparse.Namespace, decoder: Replica, keys: Sequence[str], load_before: float, machine: dict[str, str]
) -> AsyncIterator[Row]:
    for rate_s, way in itertools.product(options.rates, (CALLS, STREAMS)):
        setting = Setting(
            subject=WITHOUT_THE_MODEL,
            wait_ms=options.wait_ms,
            rate_s=rate_s,
            way=way,
            annotators=options.annotators,
            seconds=options.seconds,
            load_before=load_before,
        )
        async with Annotators(decoder.address, keys, options.annotators, way) as annotators:
            await annotators.warm_up()
            start_s, before = time.monotonic(), read_usage(decoder.pid)
            outcomes = await annotators.click(rate_s, options.seconds)
            took_s, after = time.monotonic() - start_s, read_usage(decoder.pid)
        usage = Usage(after.loop_s - before.loop_s, after.process_s - before.process_s)
        yield summarise(setting, outcomes, took_s, usage, machine)


def read_usage(pid: int) -> Usage:
    """Since the start of the service, whose main thread runs the event loop."""
    return Usage(cpu_seconds(pid, main_thread=True), cpu_seconds(pid))


@contextlib.contextmanager
def running(wait_ms: int, secret: str) -> Iterator[tuple[Replica, str]]:
    """The decoder service, ready, and the URL of its Redis."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "secret").write_text(secret)
        arguments = ("--device", "cpu", "--cpu-batch-prompts", _BATCH_PROMPTS, "--secret-file", f"{folder}/secret")
        environment = {WAIT_MS: str(wait_ms), "SPLITSAM_DECODER_LOG_FORMAT": "json"}
        redis = RedisServer(folder)
        with contextlib.ExitStack() as stack:
            stack.callback(redis.kill)
            redis.start()
            decoder = Replica("decoder", folder, redis.url, arguments, "bench.loop.decoder", environment)
            stack.callback(decoder.terminate)
            decoder.until_ready()
            yield decoder, redis.url


async def run(options: argparse.Namespace, machine: dict[str, str], load_before: float, results: Path) -> None:
    file = ResultsFile(results, Row)
    secret = secrets.token_hex(16)
    with running(options.wait_ms, secret) as (decoder, redis_url):
        keys = await store_images(redis_url, secret.encode(), decoder.address)
        async for row in measure(options, decoder, keys, load_before, machine):
            print(describe_row(row), flush=True)
            file.add(row)


def main(arguments: Sequence[str]) -> None:
    options = parse_arguments(arguments)
    load_before = os.getloadavg()[0]
    machine = describe_machine("bench.loop", choose_device("cpu"), options.commit, arguments)
    machine["grpcio"] = importlib.metadata.version("grpcio")
    path = results_path(options.results, "loop", machine["gpu"])
    asyncio.run(run(options, machine, load_before, path))
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
