"""Times the encoder service's start, first with nothing compiled and then with what that start has left on disk.

    python -m bench.readiness --models vit_b vit_h --precisions bf16 seed

Weights are random but for vit_t's own; the service reads them from a file, as it would a checkpoint, and verifies its
SHA-256. There is no Redis: the service starts without. Rows go to `bench/results/readiness-<gpu>.csv` as they come;
`python -m bench.readiness.tables` makes tables of them.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
from safetensors.torch import save_file

from bench.machine import describe_machine
from bench.readiness.rows import Row
from bench.row_file import RESULTS, ResultsFile, results_path
from bench.waterfall.subjects import load_subject
from splitsam.client.processes import LOOPBACK, Child, StackError, free_ports, stop_all
from splitsam.client.stack import is_serving
from splitsam.common.architectures import ARCHITECTURES
from splitsam.common.checkpoint_files import file_sha256
from splitsam.common.device import choose_device
from splitsam.common.settings import SettingsProblem
from splitsam.encoder_service.precision import choose_precision
from splitsam.v1 import encoder_pb2, encoder_pb2_grpc

ENCODER = "splitsam.v1.EncoderService"
IMAGE = Path(__file__).parents[2] / "client/assets/demo.jpg"
POLL_S, ENCODE_S, STOP_S = 0.1, 60.0, 30.0


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.readiness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=ARCHITECTURES, default=["vit_b"])
    parser.add_argument("--precisions", nargs="+", default=["bf16"])
    parser.add_argument("--batch-sizes", default="1,4,16", help="as the service takes them")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--start-seconds", type=float, default=300.0, help="a start may take, at most")
    parser.add_argument("--limit-seconds", type=float, default=float("inf"), help="begin no start later than this")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV")
    parser.add_argument("--commit", default="", help="what the CSV names, where there is no git")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, machine: dict[str, str], folder: Path) -> Iterator[Row]:
    end = time.monotonic() + options.limit_seconds
    for model in options.models:
        checkpoint = folder / f"{model}.safetensors"
        save_file(load_subject(model, None, outliers=False).sam.state_dict(), checkpoint)
        for precision in options.precisions:
            cache = folder / f"{model}-{precision}"
            for state in ("cold", "warm"):
                if time.monotonic() > end:
                    print(f"left out: {model} {precision} {state}: the time limit is over", flush=True)
                    continue
                rungs = " ".join(choose_precision(precision, choose_device(options.device), "").rungs)
                figures = time_start(options, checkpoint, precision, cache)
                yield Row(model, precision, options.batch_sizes, state, rungs, *figures, **machine)
        checkpoint.unlink()


def time_start(
    options: argparse.Namespace, checkpoint: Path, precision: str, cache: Path
) -> tuple[float, float, float]:
    """Start the service, send it a photograph twice, and stop it: seconds until ready, milliseconds of each encode.

    Raises:
        StackError: it ended, or was not ready in time.
    """
    port, nobody = free_ports(2)
    flags = {
        "--port": port,
        "--checkpoint": checkpoint,
        "--sha256": file_sha256(checkpoint),
        "--device": options.device,
        "--precision": precision,
        "--batch-sizes": options.batch_sizes,
        "--redis-url": f"redis://{LOOPBACK}:{nobody}",
        "--log-format": "text",
    }
    words = [str(word) for pair in flags.items() for word in pair]
    folders = {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TRITON_CACHE_DIR": str(cache / "triton")}
    log = checkpoint.with_suffix(".log")
    start = time.monotonic()
    child = Child("encoder service", [sys.executable, "-m", "splitsam.encoder_service", *words], log, folders)
    try:
        address = f"{LOOPBACK}:{port}"
        while not is_serving(address, ENCODER):
            child.check_alive("starting")
            if time.monotonic() - start > options.start_seconds:
                raise StackError(f"not ready after {options.start_seconds:g} s", child.log_tail())
            time.sleep(POLL_S)
        ready_s = time.monotonic() - start
        with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            stub = encoder_pb2_grpc.EncoderServiceStub(channel)
            return ready_s, _time_encode_ms(stub), _time_encode_ms(stub)
    finally:
        stop_all([child], STOP_S)


def _time_encode_ms(stub: encoder_pb2_grpc.EncoderServiceStub) -> float:
    request = encoder_pb2.EncodeImageRequest(image=IMAGE.read_bytes())
    start = time.monotonic()
    answer = stub.EncodeImage(request, timeout=ENCODE_S)
    if answer.stored or answer.cache_hit:
        raise RuntimeError("an encode without Redis was stored or found")
    return 1e3 * (time.monotonic() - start)


def main(arguments: Sequence[str]) -> None:
    options = parse_arguments(arguments)
    machine = describe_machine("bench.readiness", choose_device(options.device), options.commit, arguments)
    path = results_path(options.results, "readiness", machine["gpu"])
    results = ResultsFile(path, Row)
    with tempfile.TemporaryDirectory() as folder:
        try:
            for row in measure(options, machine, Path(folder)):
                print(
                    f"{row.model} {row.precision} {row.cache}: ready in {row.ready_s:.1f} s, "
                    f"encodes in {row.first_encode_ms:.0f} and {row.second_encode_ms:.0f} ms; {row.rungs}",
                    flush=True,
                )
                results.add(row)
        except SettingsProblem as problem:
            sys.exit(f"error: {problem}")
        except StackError as problem:
            sys.exit(f"error: {problem}\n" + "\n".join(problem.log_tail))
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
