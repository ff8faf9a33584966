"""Times `splitsam encode` and `splitsam export`, each on images that nobody has encoded and once more.

    python -m bench.datasets

Starts Redis and both services with the shipped vit_t and runs the real commands as processes of their own; what they
send to the encoder service is counted on the way. Images are one photograph with different bytes behind its end, boxes
are drawn at random. Rows go to `bench/results/datasets-<device>.csv`; `python -m bench.datasets.tables` makes tables.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from bench.datasets.rows import Row
from bench.machine import describe_machine, positive
from bench.relay import Relay
from bench.row_file import RESULTS, ResultsFile, results_path
from splitsam.client.processes import StackError
from splitsam.client.scrape import Look, look
from splitsam.client.stack import Stack, StackSettings
from splitsam.common.device import choose_device

IMAGE = Path(__file__).parents[2] / "client/assets/demo.jpg"
_SCRAPE_S = 10.0


@dataclass(frozen=True)
class Run:
    """What all commands of a benchmark share."""

    stack: Stack
    folder: Path
    machine: dict[str, str]
    limit_s: float


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.datasets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encode-images", type=positive, default=200, help="of `splitsam encode`")
    parser.add_argument("--export-images", type=positive, default=50, help="of `splitsam export`")
    parser.add_argument("--boxes", type=positive, default=10, help="on each of those")
    parser.add_argument("--image", type=Path, default=IMAGE, help="a JPEG, used as many different images")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--limit-seconds", type=float, default=3600.0, help="of one command")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV")
    parser.add_argument("--commit", default="", help="what the CSV names, where there is no git")
    return parser.parse_args(arguments)


def write_images(folder: Path, photo: Path, count: int) -> list[str]:
    """Write the photograph as so many different images, the same every time; returns their names."""
    folder.mkdir()
    names = [f"{number:05}.jpg" for number in range(count)]
    for name in names:
        (folder / name).write_bytes(photo.read_bytes() + f"{folder.name} {name}".encode())
    return names


def write_boxes(path: Path, photo: Path, names: Sequence[str], boxes: int) -> None:
    """Write a COCO file with so many random boxes on each image, the same every time."""
    chance = random.Random(1)
    with Image.open(photo) as image:
        width, height = image.size
    images = [{"id": i, "file_name": name, "width": width, "height": height} for i, name in enumerate(names)]
    annotations = []
    for image_id in range(len(names)):
        for _ in range(boxes):
            size = chance.uniform(0.05, 0.5) * width, chance.uniform(0.05, 0.5) * height
            corner = chance.uniform(0, width - size[0]), chance.uniform(0, height - size[1])
            bbox = [*corner, *size]
            annotations.append({"id": len(annotations), "image_id": image_id, "category_id": 1, "bbox": bbox})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "box"}]}
    path.write_text(json.dumps(content))


def measure(run: Run, options: argparse.Namespace) -> Iterator[Row]:
    encoded, exported = run.folder / "encoded", run.folder / "exported"
    write_images(encoded, options.image, options.encode_images)
    names = write_images(exported, options.image, options.export_images)
    write_boxes(run.folder / "boxes.json", options.image, names, options.boxes)
    for scenario in ("encode", "encode again"):
        yield time_command(run, scenario, encoded, 0, "encode", str(encoded))
    boxes = options.export_images * options.boxes
    export = ("export", "boxes.json", "--root", str(exported), "--out", "masks.json")
    for scenario in ("export", "export again"):
        yield time_command(run, scenario, exported, boxes, *export)


def time_command(run: Run, scenario: str, images: Path, boxes: int, *words: str) -> Row:
    """Run a command to its end, between two looks at both services.

    Raises:
        RuntimeError: it failed, or left something undone.
    """
    urls = [run.stack.metrics_url(name) for name in ("encoder", "decoder")]
    before, load_before = [look(url, _SCRAPE_S) for url in urls], os.getloadavg()[0]
    with Relay(run.stack.encoder) as relay:
        where = ("--encoder", relay.address, "--decoder", run.stack.decoder, "--report", "report.json")
        command = [sys.executable, "-c", "from splitsam.client.cli import main; main()", *words, *where]
        start_s = time.monotonic()
        done = subprocess.run(
            command, cwd=run.folder, timeout=run.limit_s, stdout=subprocess.PIPE, text=True, check=False
        )
        seconds = time.monotonic() - start_s
        sent_kib = relay.sent_bytes / 1024
    if done.returncode:
        raise RuntimeError(f"splitsam {words[0]} ended with status {done.returncode}: {done.stdout.strip()}")
    files = [path.stat().st_size for path in images.iterdir()]
    encoder, decoder = (look(url, _SCRAPE_S).since(earlier) for url, earlier in zip(urls, before, strict=True))
    pass_s = json.loads((run.folder / "report.json").read_text())["elapsed_s"]
    return Row(
        scenario=scenario,
        images=len(files),
        boxes=boxes,
        seconds=seconds,
        pass_s=pass_s,
        per_s=(boxes or len(files)) / pass_s,
        sent_kib=sent_kib,
        files_kib=sum(files) / 1024,
        image_fill=_fill(encoder),
        prompt_fill=_fill(decoder),
        read_share=encoder.total("splitsam_image_decode_seconds_sum") / seconds,
        encoder_share=encoder.total("splitsam_model_seconds_sum") / seconds,
        redis_share=sum(seen.total("splitsam_cache_seconds_sum") for seen in (encoder, decoder)) / seconds,
        decoder_share=decoder.total("splitsam_model_seconds_sum") / seconds,
        write_share=decoder.total("splitsam_mask_format_seconds_sum") / seconds,
        load_before=load_before,
        **run.machine,
    )


def _fill(seen: Look) -> float | None:
    batches = seen.total("splitsam_batch_fill_count")
    return seen.total("splitsam_batch_fill_sum") / batches if batches else None


def main(arguments: Sequence[str]) -> None:
    options = parse_arguments(arguments)
    machine = describe_machine("bench.datasets", choose_device(options.device), options.commit, arguments)
    path = results_path(options.results, "datasets", machine["gpu"])
    results = ResultsFile(path, Row)
    service_args = ("--device", options.device)
    settings = StackSettings(encoder_args=service_args, decoder_args=service_args).on_free_ports()
    with tempfile.TemporaryDirectory() as folder:
        try:
            with Stack(settings) as stack:
                for row in measure(Run(stack, Path(folder), machine, options.limit_seconds), options):
                    print(
                        f"{row.scenario}: {row.images} images, {row.boxes} boxes in {row.seconds:.1f} s, "
                        f"{row.per_s:.1f} a second, {row.sent_kib:.0f} of {row.files_kib:.0f} KiB sent",
                        flush=True,
                    )
                    results.add(row)
        except StackError as problem:
            sys.exit(f"error: {problem}\n" + "\n".join(problem.log_tail))
        except (RuntimeError, subprocess.TimeoutExpired) as problem:
            sys.exit(f"error: {problem}")
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
