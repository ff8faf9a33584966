"""Chooses the tiles of the GPU at hand."""

import functools
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

from bench.attention.inputs import DTYPE, KINDS, MODELS, make_inputs
from bench.attention.rows import Row
from bench.attention.timing import cases, measure, ours
from splitsam.kernels.tiles import Tile, lookup_tile, tile_key, tiles_path, write_tiles

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
        Tile(64, 4, 3, overlap=True),  # for heads of 64
        Tile(64, 4, 2, overlap=True),
    ],
}


def compile_candidate(kind: str, model: str, tile: Tile) -> str:
    """Runs once at batch 1, in a process of its own, to fill Triton's cache; returns what went wrong."""
    try:
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
