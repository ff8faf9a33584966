"""The seed's accuracy experiment on a dataset in COCO's format: one centre point an object, mean IoU, rung by rung.

    python -m bench.coco --annotations instances_val2017.json --images val2017 --checkpoint sam_vit_b_01ec64.pth
    python -m bench.coco.drawn --output out/drawn --scenes 32          # a dataset that needs no download
    python -m bench.coco --annotations out/drawn/instances.json --images out/drawn/images --rungs bf16

A rung's row is the encoder with it and all rungs below it that this device can do (`sparse_mlp` is 2:4 on the MLPs
alone, `fp8` stands in the place of int8); the decoder stays in fp32, so that a difference is the encoder's. The point
is the seed's, described at `scores.find_centre_point`. An image is encoded once and answers each point with three masks
at its own resolution.
Columns, means over objects:

    own choice   ground truth, the mask this rung rates best: the seed's figure
    fp32 choice  ground truth, the mask that fp32 rates best
    oracle       ground truth, the best of the three
    vs fp32      fp32's own mask: the same point and the mask that fp32 rates best
    flips        objects of which this rung rates another mask best than fp32 does

The seed counts crowd annotations too; here they are left out and their number is printed, so on COCO val2017 means are
over fewer objects than in the seed's table. Small is below 32 x 32 px of area, medium below 96 x 96, as in COCO.

Each image is a line of the results file as soon as it is done; the same command goes on where an interrupted one
stopped, with more images or rungs if asked. What cannot be used is named and left out, and the exit status is then 1.
"""

import argparse
import hashlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.coco.dataset import Dataset, read_dataset
from bench.coco.experiment import LADDER, PROBLEMS_SHOWN, Experiment, Problems, choose_rungs, list_prefix, run
from bench.coco.rows import RowFile
from bench.coco.table import print_table, summarise, write_table
from bench.commit import read_commit
from bench.pruning import Sources
from splitsam.client.coco_file import DatasetError
from splitsam.client.journal import JournalError
from splitsam.common.architectures import ARCHITECTURES
from splitsam.common.checkpoint_files import file_sha256
from splitsam.common.checkpoints import LoadedModel, load_model
from splitsam.common.device import choose_device, describe_device
from splitsam.common.errors import CheckpointError
from splitsam.common.settings import DEFAULT_CACHE_DIR, SettingsProblem
from splitsam.decoder_service.model import DecoderModel


def describe_run(arguments: argparse.Namespace, model: LoadedModel) -> dict[str, str]:
    """For the record beside the figures."""
    return {
        "dataset": arguments.annotations.name,
        "model": model.name,
        "model_id": model.model_id[:12],
        "device": describe_device(arguments.device),
        "torch": torch.__version__,
        "commit": arguments.commit or read_commit(),
        "command": shlex.join(["python", "-m", "bench.coco", *sys.argv[1:]]),
    }


def fix_settings(arguments: argparse.Namespace, model: LoadedModel, environment: dict[str, str]) -> dict[str, str]:
    """What rows of one results file must share: everything that figures depend on but the rung and the image."""
    return {
        "annotations": hashlib.sha256(arguments.annotations.read_bytes()).hexdigest(),
        "images": str(arguments.images.resolve()),
        "model_id": model.model_id,
        "pruned_on": " ".join(file_sha256(path) for path in arguments.image),
        **{name: environment[name] for name in ("device", "torch", "commit")},
    }


def parse_device(word: str) -> torch.device:
    try:
        return choose_device(word)
    except SettingsProblem as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{word!r} is none of auto, cpu, cuda or cuda:N") from error


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=Path, required=True, help="JSON file in COCO's format")
    parser.add_argument("--images", type=Path, required=True, help="folder that its file names are in")
    parser.add_argument("--model", choices=ARCHITECTURES, help="architecture; read from the checkpoint when unset")
    parser.add_argument("--checkpoint", help="path, file:// or https:// URL; unset: the shipped vit_t")
    parser.add_argument("--rungs", nargs="+", choices=LADDER, help="rows besides fp32; unset: all this device can do")
    parser.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        help="prune on this image, may be repeated; none: by magnitude",
    )
    parser.add_argument("--limit", type=int, help="only the first images")
    parser.add_argument("--device", type=parse_device, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--results", type=Path, help="JSON lines, gone on with; the table goes beside it as .csv")
    parser.add_argument("--commit", help="what the results name, where there is no git")
    arguments = parser.parse_args(words)
    if arguments.limit is not None and arguments.limit < 1:
        parser.error("--limit must be at least 1")
    if arguments.results is not None and arguments.results.suffix == ".csv":
        parser.error("--results takes JSON lines: the table goes beside it as .csv")
    return arguments


def load_inputs(arguments: argparse.Namespace) -> tuple[LoadedModel, Sources, Dataset]:
    """Raises SystemExit with one line when something that was asked for cannot be had."""
    try:
        dataset = read_dataset(arguments.annotations, arguments.images)
        checkpoint = arguments.checkpoint
        model = load_model(model=arguments.model, checkpoint=checkpoint, sha256=None, cache_dir=DEFAULT_CACHE_DIR)
        sources = Sources(model.sam, arguments.image, arguments.device)
    except (DatasetError, CheckpointError) as error:
        sys.exit(f"error: {error}")
    if model.optimisation is not None:
        sys.exit(f"error: {model.path} is already optimised, for {model.optimisation.precision}: give its source")
    return model, sources, dataset


def main(words: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(words)
    model, sources, dataset = load_inputs(arguments)
    device = arguments.device
    rungs = choose_rungs(arguments.rungs, device)
    images = dataset.images[: arguments.limit]
    results = arguments.results or Path(f"out/coco-{arguments.annotations.stem}-{model.name}.jsonl")
    environment = describe_run(arguments, model)
    objects = sum(len(image.objects) for image in images)
    print(f"{len(images)} images, {objects} objects; {dataset.crowds} crowd annotations of the dataset are left out")
    print(f"{model.name}{' (a demonstration model)' if model.demonstration else ''} on {describe_device(device)}")
    problems = Problems()
    problems.report(dataset.problems)
    try:
        with RowFile(results, fix_settings(arguments, model, environment), environment) as rows:
            experiment = Experiment(model, sources, device, DecoderModel(model.sam, device), images, rows, problems)
            run(experiment, rungs)
            lines = [line for r in rungs for line in summarise(r, list_prefix(r, device), experiment.scores(r))]
    except JournalError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(f"interrupted: the same command goes on from {results}", file=sys.stderr)
        return 130
    print_table(lines)
    write_table(results.with_suffix(".csv"), lines, environment)
    if problems:
        print(f"{len(problems)} things could not be used; the first {PROBLEMS_SHOWN} are named above", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
