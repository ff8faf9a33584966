"""`splitsam calibrate`: what each precision does to masks on images like those to be served, and how fast it is here.

By the report that it writes, see `calibration.py`, `--precision auto` takes the fastest precision that keeps the masks.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from splitsam.common.checkpoints import LoadedModel, load_model
from splitsam.common.device import choose_device, describe_device
from splitsam.common.errors import InvalidArgument
from splitsam.common.settings import DEFAULT_CACHE_DIR
from splitsam.encoder_service.ahead_of_time import draft_of, quiet
from splitsam.encoder_service.calibration import (
    BROKEN_IOU,
    Calibration,
    CalibrationReport,
    name_report,
    report_folders,
)
from splitsam.encoder_service.calibrator import REFERENCE, CalibrationProblem, Calibrator
from splitsam.encoder_service.precision import AUTO, PRECISIONS, choose_precision, rungs_of
from splitsam.encoder_service.preprocess import ImageLimits, PreparedImage, prepare_image
from splitsam.encoder_service.settings import EncoderSettings


def run_calibrate(
    *,
    model: str | None,
    checkpoint: str | None,
    sha256: str | None,
    cache_dir: Path | None,
    device: str,
    images: Sequence[Path],
    bound: float,
    precisions: Sequence[str],
    batch_sizes: str | None,
    max_images: int,
    limit_s: float,
) -> None:
    """Measure, write the report beside the weights, or in the cache folder, and print a table.

    Args:
        model: as checkpoint, sha256 and cache_dir, of `load_model`.
        device: auto, cpu, cuda or cuda:N.
        images: files of the kind that will be served; beyond `max_images` they are thinned out evenly.
        bound: the least mean IoU with the masks of fp32 that `auto` shall accept, 0 to 1.
        precisions: to measure beside fp32; none: all that there are.
        batch_sizes: the setting of the encoder service; None: as its environment or default has it. A CPU takes one
            image whatever it says.
        limit_s: seconds after which nothing more is begun; what is left is named.

    Raises:
        StartProblem: one line that says what to do.
        OSError: the report cannot be written.
    """
    end_s = time.monotonic() + limit_s
    asked = check_precisions(precisions)
    if not 0 <= bound <= 1:  # NaN, too
        raise CalibrationProblem(f"--bound takes a mean IoU from 0 to 1, not {bound}")
    if not images:
        raise CalibrationProblem("--images: no image is there; it takes a folder of JPEG, PNG or WebP files")
    where = choose_device(device)
    settings = EncoderSettings.load([] if batch_sizes is None else [f"--batch-sizes={batch_sizes}"])
    sizes = tuple(sorted(set(settings.batch_sizes))) if where.type == "cuda" else (1,)
    cache_dir = cache_dir or DEFAULT_CACHE_DIR
    loaded = load_model(model=model, checkpoint=checkpoint, sha256=sha256, cache_dir=cache_dir)
    if loaded.optimisation is not None:
        source = loaded.optimisation.source_sha256[:12]
        raise CalibrationProblem(
            f"{loaded.path} is optimised already, which leaves no fp32 to compare with: "
            f"calibrate the checkpoint it was made from (SHA-256 {source}...)"
        )
    name = name_report(loaded.model_id, where, rungs_of(where.type))
    path = choose_folder(loaded, checkpoint, cache_dir) / name
    with draft_of(path) as draft, quiet():
        prepared = read_images(images, max_images)
        print(f"{loaded.name} on {describe_device(where)}, {len(prepared)} images", flush=True)
        report = Calibrator(loaded, where, prepared, sizes, end_s).run(asked, bound)
        draft.write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    print("\n".join(format_table(report)))
    choice = choose_precision(AUTO, where, loaded.model_id, Calibration(report, path.name, is_of_here=True))
    print(f"\n{choice.notes[0]}\nwrote {path}")


def check_precisions(names: Sequence[str]) -> tuple[str, ...]:
    """What is measured beside fp32: those named, or all.

    Raises:
        CalibrationProblem: there is no such precision.
    """
    unknown = next((name for name in names if name not in PRECISIONS), None)
    if unknown is not None:
        raise CalibrationProblem(f"--precisions takes any of {', '.join(PRECISIONS)}, not {unknown!r}")
    return tuple(name for name in PRECISIONS if name != REFERENCE and (not names or name in names))


def read_images(paths: Sequence[Path], max_images: int) -> list[PreparedImage]:
    """Decode files; those that are no images are named on stderr and passed over.

    Raises:
        CalibrationProblem: none is left.
    """
    count = min(max_images, len(paths))
    prepared = []
    for path in [paths[i * len(paths) // count] for i in range(count)]:
        try:
            prepared.append(prepare_image(path.read_bytes(), ImageLimits()))
        except OSError as error:
            print(f"skipped {path}: {error.strerror or error}", file=sys.stderr)
        except InvalidArgument as error:
            print(f"skipped {path}: {error}", file=sys.stderr)
    if not prepared:
        raise CalibrationProblem(f"--images: none of {count} can be read")
    return prepared


def format_table(report: CalibrationReport) -> list[str]:
    """The lines of a table for people, and one for each precision that was left out."""
    sizes = sorted({size for found in report.precisions.values() for size in found.ms_per_image})
    head = ("precision", "mask mIoU", f"below {BROKEN_IOU:g}", "index flips", *(f"ms/image at {b}" for b in sizes))
    rows = [(*head, "peak MiB")]
    for name, found in report.precisions.items():
        times = (f"{found.ms_per_image[size]:.4g}" if size in found.ms_per_image else "" for size in sizes)
        peak = "" if found.peak_mib is None else f"{found.peak_mib:.0f}"
        share = f"{100 * found.broken_share:.1f} %"
        rows.append((name, f"{found.mask_miou:.4f}", share, str(found.index_flips), *times, peak))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(word.rjust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*table, *(f"left out: {name}: {reason}" for name, reason in report.left_out.items())]


def choose_folder(loaded: LoadedModel, checkpoint: str | None, cache_dir: Path) -> Path:
    """The report's: that of weights that were given, if it can be written to, else the one in the cache folder."""
    beside, cached = report_folders(loaded.path, cache_dir)
    return beside if checkpoint is not None and os.access(beside, os.W_OK) else cached
