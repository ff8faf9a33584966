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
import functools
import itertools
import math
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from bench.attention.rows import Row
from bench.machine import describe_machine
from bench.row_file import RESULTS, results_path, write_rows
from splitsam.kernels.relpos_global import global_attention, global_attention_reference, launch_global_attention
from splitsam.kernels.relpos_window import (
    WINDOW,
    launch_window_attention,
    window_attention,
    window_attention_reference,
)
from splitsam.kernels.tiles import Tile, lookup_tile, tile_key, tiles_path, write_tiles

GRID = (64, 64)
TOKENS = GRID[0] * GRID[1]
MODELS = {"ViT-B": (12, 64), "ViT-H": (16, 80)}
KINDS = ("global", "window")
BATCHES = (1, 8, 16)
DTYPE = torch.bfloat16
REPEAT_MS = 10  # of ten replays each
COMPILERS = 8
COMPILE_LIMIT_S = 45

CANDIDATES = {
    "global": [
        Tile(128, 8, 3),
        Tile(128, 8, 2, max_registers=128),
        Tile(128, 8, 3, max_registers=128),
        Tile(128, 8, 3, tma=True),
        Tile(128, 8, 2, tma=True, max_registers=128),
        Tile(128, 8, 3, tma=True, max_registers=128),
        Tile(128, 8, 4, tma=True, max_registers=128),
        Tile(128, 4, 3, tma=True),
        Tile(64, 4, 3),
        Tile(64, 4, 2, tma=True, max_registers=128),
        Tile(64, 4, 3, tma=True, max_registers=128),
        Tile(64, 4, 3, tma=True, max_registers=160),
        Tile(128, 4, 4, overlap=True),  # for heads of 64
        Tile(64, 4, 2, overlap=True),  # for heads of 80
    ],
    "window": [
        Tile(64, 4, 1),
        Tile(64, 4, 2),
        Tile(64, 4, 1, max_registers=168),
        Tile(128, 8, 1),
        Tile(128, 8, 2),
        Tile(128, 8, 1, max_registers=128),
    ],
}


@dataclass(frozen=True)
class Inputs:
    """One attention layer: qkv [B, 4096, 3, heads, d], its bias [3, heads, d] and the two tables."""

    kind: str
    qkv: torch.Tensor
    bias: torch.Tensor
    rel_pos_h: torch.Tensor
    rel_pos_w: torch.Tensor

    @property
    def scale(self) -> float:
        return float(self.qkv.shape[-1] ** -0.5)

    def reference(self, image: int, dtype: torch.dtype) -> torch.Tensor:
        """[1, 4096, heads * d] of one image, by the PyTorch reference in this dtype."""
        qkv, bias, h, w = (
            t.to(dtype) for t in (self.qkv[image : image + 1], self.bias, self.rel_pos_h, self.rel_pos_w)
        )
        if self.kind == "global":
            return global_attention_reference(qkv, h, w, GRID, self.scale)
        return window_attention_reference(qkv, bias, h, w, GRID, self.scale)

    def launch(self, tile: Tile) -> torch.Tensor:
        if self.kind == "global":
            return launch_global_attention(self.qkv, self.rel_pos_h, self.rel_pos_w, GRID, self.scale, tile)
        return launch_window_attention(self.qkv, self.bias, self.rel_pos_h, self.rel_pos_w, GRID, self.scale, tile)

    def operator(self) -> torch.Tensor:
        """As the encoder calls it, with the tile that is installed."""
        out: torch.Tensor
        if self.kind == "global":
            out = global_attention(self.qkv, self.rel_pos_h, self.rel_pos_w, *GRID, self.scale)
        else:
            out = window_attention(self.qkv, self.bias, self.rel_pos_h, self.rel_pos_w, *GRID, self.scale)
        return out


def make_inputs(kind: str, heads: int, d: int, batch: int) -> Inputs:
    side = GRID[0] if kind == "global" else WINDOW
    generator = torch.Generator("cuda").manual_seed(batch)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return (std * torch.randn(shape, device="cuda", generator=generator)).to(DTYPE)

    tables = (normal(2 * side - 1, d, std=0.2), normal(2 * side - 1, d, std=0.2))
    return Inputs(kind, normal(batch, TOKENS, 3, heads, d), normal(3, heads, d), *tables)


@dataclass(frozen=True)
class Variant:
    """Something to time. `image` cuts an image out of its output, `expected` is the float32 result of that image."""

    name: str
    run: Callable[[], torch.Tensor]
    image: Callable[[torch.Tensor, int], torch.Tensor]
    expected: Callable[[int], torch.Tensor]
    note: str = ""


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (actual.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    return float(difference)


def allowed_error(inputs: Inputs) -> float:
    return 2 * relative_error(inputs.reference(0, DTYPE), inputs.reference(0, torch.float32))


def measure(case: "Case", variant: Variant) -> Row:
    """Checks a variant, then times it; a failure becomes the row's note."""
    row = functools.partial(Row, case.model, case.inputs.kind, case.batch, variant.name)
    try:
        out = variant.run()
        images = {0, case.batch - 1}
        errors = [relative_error(variant.image(out, image), variant.expected(image)) for image in images]
        error = max(errors, key=lambda e: math.inf if math.isnan(e) else e)
        del out
        if not error <= case.allowed_error:
            return row(error=error, allowed_error=case.allowed_error, note=f"WRONG, not timed {variant.note}")
        ms = triton.testing.do_bench_cudagraph(variant.run, rep=REPEAT_MS, return_mode="median")
    except Exception as failure:  # noqa: BLE001 one variant's failure must not stop the others
        note = f"{type(failure).__name__}: {' '.join(str(failure).split())}"[:160]
        return row(allowed_error=case.allowed_error, note=note)
    finally:
        torch.cuda.empty_cache()
    return row(ms, case.tflop / ms * 1e3, error, case.allowed_error, variant.note)


@dataclass(frozen=True)
class Case:
    """A model, kind and batch, with its inputs on the GPU."""

    model: str
    batch: int
    inputs: Inputs
    allowed_error: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "allowed_error", allowed_error(self.inputs))

    @property
    def tflop(self) -> float:
        heads, d = MODELS[self.model]
        keys = TOKENS if self.inputs.kind == "global" else WINDOW * WINDOW
        return 4e-12 * self.batch * TOKENS * keys * heads * d

    @functools.cached_property
    def expected(self) -> dict[int, torch.Tensor]:
        return {image: self.inputs.reference(image, torch.float32) for image in {0, self.batch - 1}}


def ours(case: Case, name: str, run: Callable[[], torch.Tensor], note: str = "") -> Variant:
    return Variant(name, run, lambda out, image: out[image : image + 1], case.expected.__getitem__, note)


def split_heads(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v for SDPA, contiguous: [B, heads, 4096, d], or [25 B, heads, 196, d] with the padded tokens."""
    qkv = inputs.qkv
    batch, _, _, heads, d = qkv.shape
    if inputs.kind == "window":
        down, across = (-(-side // WINDOW) for side in GRID)
        padded = inputs.bias.expand(batch, down * WINDOW, across * WINDOW, 3, heads, d).clone()
        padded[:, : GRID[0], : GRID[1]] = qkv.view(batch, *GRID, 3, heads, d)
        windows = padded.view(batch, down, WINDOW, across, WINDOW, 3, heads, d).transpose(2, 3)
        qkv = windows.reshape(batch * down * across, WINDOW * WINDOW, 3, heads, d)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous()
    return q, k, v


def dense_bias(inputs: Inputs, q: torch.Tensor) -> torch.Tensor:
    """[.., heads, N, N] in the dtype of q, its rows at a multiple of 8 elements as the backends ask."""
    groups, heads, tokens, d = q.shape
    side = GRID[0] if inputs.kind == "global" else WINDOW
    positions = torch.arange(side, device=q.device)
    offsets = positions[:, None] - positions[None, :] + side - 1
    grid_q = q.view(groups, heads, side, side, d)
    rel_h = torch.einsum("bnhwc,hkc->bnhwk", grid_q, inputs.rel_pos_h[offsets])[..., :, None]
    rel_w = torch.einsum("bnhwc,wkc->bnhwk", grid_q, inputs.rel_pos_w[offsets])[..., None, :]
    bias = (rel_h + rel_w).reshape(groups, heads, tokens, tokens)
    return pad(bias, (0, -tokens % 8))[..., :tokens] if tokens % 8 else bias


def sdpa_variants(case: Case) -> Iterator[Variant]:
    """Flash and cuDNN without bias, memory-efficient and cuDNN with a dense one."""
    q, k, v = split_heads(case.inputs)
    per_image = q.shape[0] // case.batch

    def image(out: torch.Tensor, index: int) -> torch.Tensor:
        return out[index * per_image : (index + 1) * per_image]

    @functools.cache
    def bias() -> torch.Tensor:
        return dense_bias(case.inputs, q)

    def expected(biased: bool, index: int) -> torch.Tensor:
        scores = (image(q, index).float() * case.inputs.scale) @ image(k, index).float().transpose(-2, -1)
        if biased:
            scores += image(bias(), index)
        weights: torch.Tensor = scores.softmax(dim=-1)
        return weights @ image(v, index).float()

    def run(backend: SDPBackend, biased: bool) -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, attn_mask=bias() if biased else None, scale=case.inputs.scale)

    for name, backend, biased in (
        ("flash", SDPBackend.FLASH_ATTENTION, False),
        ("cuDNN", SDPBackend.CUDNN_ATTENTION, False),
        ("mem-efficient", SDPBackend.EFFICIENT_ATTENTION, True),
        ("cuDNN", SDPBackend.CUDNN_ATTENTION, True),
    ):
        yield Variant(
            f"{name} SDPA, {'dense' if biased else 'no'} bias",
            functools.partial(run, backend, biased),
            image,
            functools.partial(expected, biased),
        )


def cases(batches: tuple[int, ...]) -> Iterator[Case]:
    for kind, (model, (heads, d)), batch in itertools.product(KINDS, MODELS.items(), batches):
        yield Case(model, batch, make_inputs(kind, heads, d, batch))
        torch.cuda.empty_cache()


def compile_candidate(kind: str, model: str, tile: Tile) -> str:
    """Runs once at batch 1, in a process of its own, to fill Triton's cache; returns what went wrong."""
    try:
        make_inputs(kind, *MODELS[model], 1)
        make_inputs(kind, *MODELS[model], 1).launch(tile)
        torch.cuda.synchronize()
    except Exception as failure:  # noqa: BLE001 reported in the table, which goes on with the other tiles
        return f"{type(failure).__name__}: {' '.join(str(failure).split())}"[:160]
    return ""


def compile_candidates() -> dict[str, dict[str, list[Tile]]]:
    """Compiles all candidates side by side; returns those that run, by kind and model."""
    usable: dict[str, dict[str, list[Tile]]] = {kind: {model: [] for model in MODELS} for kind in KINDS}
    jobs = [(kind, model, tile) for kind in KINDS for model in MODELS for tile in CANDIDATES[kind]]
    deadline = time.monotonic() + COMPILE_LIMIT_S
    pool = ProcessPoolExecutor(COMPILERS, mp_context=multiprocessing.get_context("spawn"))
    results = [pool.submit(compile_candidate, *job) for job in jobs]
    for (kind, model, tile), result in zip(jobs, results, strict=True):
        try:
            failure = result.result(timeout=max(0.1, deadline - time.monotonic()))
        except Exception as error:  # noqa: BLE001 a dead or late process is one candidate less
            failure = type(error).__name__
        if failure:
            print(f"cannot use {kind} {model} {tile}: {failure}", flush=True)
        else:
            usable[kind][model].append(tile)
    for process in list(getattr(pool, "_processes", {}).values()):
        process.terminate()
    pool.shutdown(wait=False, cancel_futures=True)
    return usable


def tune(batches: tuple[int, ...], out: Path) -> list[Row]:
    """Times every usable candidate at every batch and writes the fastest right ones for this GPU."""
    usable = compile_candidates()
    chosen: dict[str, dict[int, Tile]] = {}
    rows = []
    for case in cases(batches):
        timed = []
        for tile in usable[case.inputs.kind][case.model]:
            note = ", ".join(f"{key} {value}" for key, value in asdict(tile).items() if value)
            row = measure(case, ours(case, "candidate", functools.partial(case.inputs.launch, tile), note))
            rows.append(row)
            print(row.line(), flush=True)
            if row.ms is not None:
                timed.append((row.ms, tile))
        if timed:
            key = tile_key(case.inputs.kind, MODELS[case.model][1], DTYPE)
            chosen.setdefault(key, {})[case.batch] = min(timed, key=lambda pair: pair[0])[1]
    path = write_tiles(torch.cuda.get_device_name(), chosen, out)
    tiles_path(torch.cuda.get_device_name()).write_text(path.read_text())
    lookup_tile.cache_clear()
    print(f"wrote {path} and installed it", flush=True)
    return rows


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
