"""`splitsam encode`: many images over one stream, with progress, a report of what failed, and an honest exit status."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import grpc

from splitsam.client.client import Client
from splitsam.client.errors import SplitsamError
from splitsam.client.image_list import ListedImage
from splitsam.client.progress import Progress
from splitsam.client.results import BulkResult

_STREAM_TIMEOUT_S = 24 * 3600.0
DONE, AGAIN, BAD_IMAGES = 0, 1, 3


@dataclass(frozen=True)
class Failure:
    """An image that is not encoded and stored; `is_final` when trying it again would change nothing."""

    image: str
    message: str
    is_final: bool


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
        """0: every image is encoded and stored; 1: another run may do more; 3: all but images that never will be."""
        if self.unanswered or not all(failure.is_final for failure in self.failures):
            return AGAIN
        return BAD_IMAGES if self.failures else DONE

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
            for result in client.encode_many(paths, in_flight=in_flight, stream_timeout_s=_STREAM_TIMEOUT_S):
                failure = _failure(result)
                report.unanswered -= 1
                if failure is None:
                    report.encoded += 1
                    report.found += result.image is not None and result.image.cache_hit
                else:
                    report.failures.append(failure)
                progress.update(None if failure is None else f"{failure.image}: {failure.message}")
        except SplitsamError as error:
            progress.say(f"failed: {report.unanswered} images, because the stream broke: {error}")
    report.elapsed_s = progress.elapsed_s
    return report


def _failure(result: BulkResult) -> Failure | None:
    image, error = str(result.source), result.error
    if isinstance(error, OSError):
        return Failure(image, error.strerror or str(error), is_final=isinstance(error, FileNotFoundError))
    if error is not None:
        return Failure(image, str(error), is_final=error.code is grpc.StatusCode.INVALID_ARGUMENT)
    if result.image is None or not result.image.stored:
        return Failure(image, "encoded, but the cache did not take it", is_final=False)
    return None
