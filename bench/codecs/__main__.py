"""Writes embeddings in every codec, reads them again, and compares the masks of clicks.

    python -m bench.codecs                       # vit_t, its held-out photographs and 9 drawn scenes
    python -m bench.codecs --scenes 0            # the photographs alone

Each object is clicked once in its middle. The encoder and the decoder compute in fp32. Rows go to
`bench/results/codecs-<device>.csv`; `python -m bench.codecs.tables` makes a table of them.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.codecs.rows import Row
from bench.machine import describe_machine
from bench.row_file import RESULTS, ResultsFile, results_path
from bench.waterfall.masks import MaskComparison
from bench.waterfall.pipelines import NestedDecoder, Pipeline
from bench.waterfall.subjects import HeldOut, draw_held_out, load_subject
from splitsam.common.codecs import CODECS, Codec, saturate
from splitsam.common.keys import Address
from splitsam.common.records import EMBEDDING, SHAPES, RecordHeader, Size, pack_record, unpack_record
from splitsam.common.shapes import IMAGE_SIDE_PX
from splitsam.encoder_service.preprocess import ImageLimits, prepare_image
from training.evaluate import find_centre
from training.photographs import PHOTOGRAPHS, load_photographs

_ADDRESS = Address(b"\0" * 16, b"\0" * 32)
_SIZE = Size(IMAGE_SIDE_PX, IMAGE_SIDE_PX)
_REPEATS = 10


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.codecs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photographs", type=int, default=100, help="at most so many of those there are")
    parser.add_argument("--scenes", type=int, default=9, help="drawn ones; drawing one takes seconds")
    parser.add_argument("--held-out", type=Path, default=Path("out/held_out.npz"), help="where drawn scenes are kept")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV")
    parser.add_argument("--commit", default="", help="what the CSV names, where there is no git")
    return parser.parse_args(arguments)


class Remembered(nn.Module):
    """An encoder that computes each image once, [1, 3, 1024, 1024] at a time."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self._encoder, self.embeddings = encoder, dict[bytes, Tensor]()

    def forward(self, images: Tensor) -> Tensor:
        key = images.numpy().tobytes()
        if key not in self.embeddings:
            self.embeddings[key] = self._encoder(images)
        return self.embeddings[key]


class Stored(nn.Module):
    """What an encoder computes, by way of a record."""

    def __init__(self, encoder: nn.Module, codec: Codec) -> None:
        super().__init__()
        self._encoder = encoder
        self._header = RecordHeader(EMBEDDING, _ADDRESS, "0" * 64, codec, SHAPES[EMBEDDING], _SIZE, _SIZE, 0)
        self.record_bytes = 0
        self.write_ms: list[float] = []
        self.read_ms: list[float] = []

    def forward(self, images: Tensor) -> Tensor:
        [embedding] = self._encoder(images)
        embedding = saturate(embedding, self._header.codec.dtype)  # as it leaves the device
        for _ in range(_REPEATS):
            start_s = time.perf_counter()
            record = pack_record(self._header, embedding)
            written_s = time.perf_counter()
            _, values = unpack_record(record, EMBEDDING, _ADDRESS)
            self.write_ms.append(1000 * (written_s - start_s))
            self.read_ms.append(1000 * (time.perf_counter() - written_s))
        self.record_bytes = len(record)
        return values[None].float()


def read_photographs(count: int) -> HeldOut:
    """The first ones, as the service prepares them."""
    images, clicks = [], []
    for photograph in load_photographs()[:count]:
        [file] = PHOTOGRAPHS.glob(f"{photograph.name}.*")
        prepared = prepare_image(file.read_bytes(), ImageLimits())
        scale = np.divide(prepared.input_size, prepared.image_size)
        centres = np.array([find_centre(mask) for mask in photograph.masks])
        images.append(prepared.pixels)
        clicks.append(torch.from_numpy((centres * scale).astype(np.float32)))
    return HeldOut(images, clicks)


@torch.inference_mode()
def measure(options: argparse.Namespace, machine: dict[str, str]) -> Iterator[Row]:
    held = read_photographs(options.photographs)
    if options.scenes:
        drawn = draw_held_out(options.scenes, options.held_out)
        held = HeldOut(held.images + drawn.images, held.clicks + drawn.clicks)
    cpu, sam = torch.device("cpu"), load_subject("vit_t", None, outliers=False).sam
    decoder = NestedDecoder(sam, cpu, torch.float32)
    encoder = Remembered(sam.image_encoder)
    masks = MaskComparison(held, sam, Pipeline(encoder, lambda: decoder), cpu)
    for codec in CODECS.values():
        stored = Stored(encoder, codec)
        found = masks.compare(Pipeline(stored, lambda: decoder), batch=1)
        write_ms, read_ms = statistics.median(stored.write_ms), statistics.median(stored.read_ms)
        figures = (len(held.images), found.prompts, found.miou, found.worst_iou, found.index_flips)
        yield Row(codec.name, stored.record_bytes, write_ms, read_ms, *figures, **machine)


def main(arguments: Sequence[str]) -> None:
    options = parse_arguments(arguments)
    machine = describe_machine("bench.codecs", torch.device("cpu"), options.commit, arguments)
    path = results_path(options.results, "codecs", machine["gpu"])
    results = ResultsFile(path, Row)
    for row in measure(options, machine):
        print(
            f"{row.codec}: {row.record_bytes:,} bytes, written in {row.write_ms:.2f} ms, read in {row.read_ms:.2f} ms; "
            f"masks {row.mask_miou:.4f}, worst {row.worst_iou:.3f}, {row.index_flips} flips of {row.clicks}",
            flush=True,
        )
        results.add(row)
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
