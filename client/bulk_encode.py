"""`splitsam encode`: many images over one stream, with progress, a report of what failed, and an honest exit status."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from splitsam.client.client import Client
from splitsam.client.errors import SplitsamError
from splitsam.client.failures import AGAIN, Failure, exit_status, image_failure
from splitsam.client.image_list import ListedImage
from splitsam.client.progress import Progress
from splitsam.client.results import BulkResult

STREAM_TIMEOUT_S = 24 * 3600.0


@dataclass
class BulkReport:
    """What became of a pass over `images` images."""

    images: int
    encoded: int = 0
    found: int = 0
    unanswered: int = 0
    elapsed_s: float = 0.0
    failures: list[Failure] = field(default_factory=list)

    @property
    def exit_status(self) -> int:
        """As of `exit_status`; done is what is encoded and stored."""
        return AGAIN if self.unanswered else exit_status(self.failures)

    def __str__(self) -> str:
        rate = f"{self.elapsed_s:.1f} s, {self.encoded / max(self.elapsed_s, 1e-9):.1f} img/s"
        return f"{self.encoded} of {self.images} images are encoded ({rate}), {self.found} of them were before"


def run_bulk_encode(client: Client, images: Sequence[ListedImage], in_flight: int, report: Path | None = None) -> int:
    """Encode all images and say how it went, in a file as well if one is named; returns the exit status."""
    result = encode_all(client, images, in_flight)
    print(result, flush=True)
    if report is not None:
        report.write_text(json.dumps(asdict(result), indent=2) + "\n")
    return result.exit_status


def encode_all(client: Client, images: Sequence[ListedImage], in_flight: int) -> BulkReport:
    """Encode all images, past those that fail; those that are in the cache are not sent."""
    paths = [image.path for image in images]
    report = BulkReport(len(images), unanswered=len(images))
    with Progress(len(images)) as progress:
        try:
            for result in client.encode_many(paths, in_flight=in_flight, stream_timeout_s=STREAM_TIMEOUT_S):
                failure = _failure(result)
                report.unanswered -= 1
                if failure is None:
                    report.encoded += 1
                    report.found += result.image is not None and result.image.cache_hit
                else:
                    report.failures.append(failure)
                progress.update(None if failure is None else str(failure))
        except SplitsamError as error:
            progress.say(f"failed: {report.unanswered} images, because the stream broke: {error}")
    report.elapsed_s = progress.elapsed_s
    return report


def _failure(result: BulkResult) -> Failure | None:
    if result.error is None and result.image is not None and result.image.stored:
        return None
    return image_failure(str(result.source), result.error)
