"""Times what stands between the products of a block in the rungs fused and fp8, and those products in both precisions.

    python -m bench.elementwise                     # one table, and bench/results/elementwise-<gpu>.csv
    python -m bench.elementwise --models vit_h      # at batch 8
    python -m bench.elementwise.tables              # writes the rows into the table of bench/README.md

Inputs are random. A time is the median over replays of a CUDA graph and is GPU time alone; on a CPU, by the host's
clock, it says that the benchmark runs and nothing more. GB/s count what has to be read and written once, TFLOP/s two
operations a multiplication. An error is that of an answer's first rows to the same in float32, root mean square over
root mean square: for a kernel that quantises of scales times numbers, for a product of what rounding both factors does
to it too.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.elementwise.rows import COLUMNS, Row
from bench.machine import describe_machine, positive
from bench.row_file import RESULTS, ResultsFile, results_path
from splitsam.common.architectures import ARCHITECTURES
from splitsam.common.device import choose_device
from splitsam.common.settings import SettingsProblem
from splitsam.encoder_service.float8 import Float8Linear, gelu_scale
from splitsam.encoder_service.fused import linear_gelu
from splitsam.encoder_service.optimize import FP8, unsupported
from splitsam.encoder_service.timing import time_on_host
from splitsam.kernels.gelu_product import gelu_product, has_gelu_product
from splitsam.kernels.normalise_rows import add_normalise_rows, normalise_rows
from splitsam.kernels.quantise_rows import quantise_rows

BATCHES = {"vit_b": 16, "vit_l": 8, "vit_h": 8}
TOKENS = 4096  # of an image
CHECKED_ROWS = 4096
EPSILON = 1e-6
REPEAT_MS = 10  # of ten replays each
CALLS_ON_HOST = 3


@dataclass(frozen=True)
class Case:
    """Something to time. `answer` makes float32 rows of what it returns, `expected` is their first ones."""

    operation: str
    shape: str
    run: Callable[[], object]
    answer: Callable[[], Tensor]
    expected: Tensor
    bytes_moved: int
    flop: int | None = None


def quantising_cases(rows: int, channels: int, device: torch.device) -> Iterator[Case]:
    """Every kernel that quantises, at the width it has in a model of so many channels."""
    x, branch = (_random(rows, channels, device=device) for _ in range(2))
    weight, bias = _random(2, channels, device=device)
    hidden = _random(rows, 4 * channels, device=device)

    def norm(some: Tensor) -> Tensor:
        return F.layer_norm(some.float(), (channels,), weight.float(), bias.float(), EPSILON)

    first = slice(CHECKED_ROWS)
    for operation, run, expected, width, read_and_written in (
        ("normalise_rows", lambda: normalise_rows(x, weight, bias, EPSILON), norm(x[first]), channels, 3),
        (
            "add_normalise_rows",
            lambda: add_normalise_rows(x, branch, weight, bias, EPSILON),
            norm(x[first] + branch[first]),
            channels,
            7,
        ),
        ("quantise_rows", lambda: quantise_rows(x), x[first].float(), channels, 3),
        (
            "quantise_rows, GELU",
            lambda: quantise_rows(hidden, True),
            F.gelu(hidden[first].float(), approximate="tanh"),
            4 * channels,
            3,
        ),
    ):
        yield Case(operation, str(width), run, _dequantised(run), expected, rows * (read_and_written * width + 4))


def _dequantised(run: Callable[[], tuple[Tensor, ...]]) -> Callable[[], Tensor]:
    def answer() -> Tensor:
        *_, quantised, scales = run()
        return quantised[:CHECKED_ROWS].float() * scales[:CHECKED_ROWS]

    return answer


def product_cases(rows: int, channels: int, device: torch.device, *, float8: bool) -> Iterator[Case]:
    """The four products of a block in bf16 and, where there is that, in fp8; the GELU apart and fused."""
    yield from _layer_cases("qkv", rows, channels, 3 * channels, device, float8=float8)
    yield from _layer_cases("proj", rows, channels, channels, device, float8=float8)
    yield from _layer_cases("lin1", rows, channels, 4 * channels, device, float8=float8)
    yield from _layer_cases("lin2", rows, 4 * channels, channels, device, float8=float8)


def _layer_cases(
    name: str, rows: int, inputs: int, outputs: int, device: torch.device, *, float8: bool
) -> Iterator[Case]:
    layer = nn.Linear(inputs, outputs, device=device, dtype=torch.bfloat16).requires_grad_(False)
    x = _random(rows, inputs, device=device)
    exact = F.linear(x[:CHECKED_ROWS].float(), layer.weight.float(), layer.bias.float())

    def case(operation: str, run: Callable[[], Tensor], expected: Tensor, factor_bytes: int = 2) -> Case:
        bytes_moved = factor_bytes * inputs * (rows + outputs) + 2 * rows * outputs
        flop = 2 * rows * inputs * outputs
        shape = f"{inputs} -> {outputs}"
        return Case(operation, shape, run, lambda: run()[:CHECKED_ROWS].float(), expected, bytes_moved, flop)

    yield case(f"{name}, bf16", lambda: layer(x), exact)
    if name == "lin1":
        activated = F.gelu(exact)
        yield case("lin1, bf16, then GELU", lambda: F.gelu(layer(x)), activated)
        yield case("lin1, bf16, GELU inside", lambda: linear_gelu(x, layer.weight, layer.bias), activated)
    if float8:
        product, quantised = Float8Linear(layer), quantise_rows(x)
        yield case(f"{name}, fp8", lambda: product(*quantised), exact, factor_bytes=1)
        if name == "lin1" and has_gelu_product(product.weight):
            yield _gelu_product_case(product, *quantised, F.gelu(exact))


def _gelu_product_case(layer: Float8Linear, rows: Tensor, scales: Tensor, expected: Tensor) -> Case:
    (count, inputs), outputs = rows.shape, len(layer.weight)
    bound = gelu_scale(layer, nn.LayerNorm(inputs, device=rows.device))

    def run() -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = gelu_product(rows, scales, layer.weight, layer.scales, layer.bias, bound)
        return out

    bytes_moved = inputs * (count + outputs) + count * outputs
    shape, flop = f"{inputs} -> {outputs}", 2 * count * inputs * outputs
    return Case("lin1, fp8, GELU and rounding inside", shape, run, _dequantised(run), expected, bytes_moved, flop)


def _random(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(torch.bfloat16)


def time_ms(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        return statistics.median(time_on_host(run, device) for _ in range(CALLS_ON_HOST))
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(run, rep=REPEAT_MS, return_mode="median"))


def measure(case: Case, model: str, rows: int, device: torch.device, machine: dict[str, str]) -> Row:
    error = float((case.answer() - case.expected).norm() / case.expected.norm())
    seconds = time_ms(case.run, device) / 1e3
    tflop_s = case.flop / seconds / 1e12 if case.flop is not None else None
    gb_s = case.bytes_moved / seconds / 1e9
    return Row(model, rows, case.operation, case.shape, 1e3 * seconds, gb_s, tflop_s, error, **machine)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.elementwise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=BATCHES, default=["vit_b", "vit_h"])
    parser.add_argument("--rows", type=positive, help="instead of 4096 an image of batch 16, or 8 of vit_l and vit_h")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV")
    parser.add_argument("--commit", default="", help="what the CSV names, where there is no git")
    options = parser.parse_args(arguments)
    try:
        device = choose_device(options.device)
    except SettingsProblem as problem:
        sys.exit(f"error: {problem}")
    machine = describe_machine("bench.elementwise", device, options.commit, arguments)
    reason = unsupported(FP8, device) if device.type == "cuda" else None
    if reason is not None:
        print(f"left out: all that is fp8: {reason}")
    results = ResultsFile(results_path(options.results, "elementwise", machine["gpu"]), Row)
    print(", ".join(f"{name} {value}" for name, value in machine.items() if value), flush=True)
    print(" | ".join(COLUMNS), flush=True)
    torch.manual_seed(0)
    with torch.inference_mode():
        for model in options.models:
            rows, channels = options.rows or TOKENS * BATCHES[model], ARCHITECTURES[model].width
            if reason is None:
                _measure_all(quantising_cases(rows, channels, device), model, rows, device, machine, results)
            products = product_cases(rows, channels, device, float8=reason is None)
            _measure_all(products, model, rows, device, machine, results)


def _measure_all(
    cases: Iterator[Case],
    model: str,
    rows: int,
    device: torch.device,
    machine: dict[str, str],
    results: ResultsFile[Row],
) -> None:
    for case in cases:
        row = measure(case, model, rows, device, machine)
        print(" | ".join(row.cells), flush=True)
        results.add(row)


if __name__ == "__main__":
    main(sys.argv[1:])
