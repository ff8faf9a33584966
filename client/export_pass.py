"""One pass of `splitsam export` over many images: encoded over one stream, their prompts asked on a few threads.

encode_many (looked up first, bounded by pushback) ─► image ─► a thread: its prompts in few requests ─► journal
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from splitsam.client.bulk_encode import STREAM_TIMEOUT_S
from splitsam.client.client import Client
from splitsam.client.errors import SplitsamError
from splitsam.client.export_file import Choice, Form, describe_mask, output_options
from splitsam.client.export_plan import TaskImage
from splitsam.client.failures import Failure, image_failure
from splitsam.client.journal import Journal
from splitsam.client.progress import Progress
from splitsam.client.results import BulkResult, EncodedImage, Mask


@dataclass(frozen=True)
class ExportOptions:
    """What is asked of an annotation file, and how much of it at a time.

    Args:
        fields: of an annotation that its prompt is made of.
        form: of the masks in the COCO file.
        tolerance_px: of polygons.
        encodes: images on their way to an embedding, at most.
        predicts: requests to the decoder at a time; as many more images wait for their turn.
        prompts_per_request: at most; fewer where a reply would be too large.
    """

    fields: tuple[str, ...] = ("bbox",)
    form: Form = "rle"
    selection: Choice = "auto"
    tolerance_px: float = 1.0
    encodes: int = 8
    predicts: int = 4
    prompts_per_request: int = 64


class ExportPass:
    """As a context manager; `run` fills in the journal, `failures` are images that are not in it afterwards."""

    def __init__(self, client: Client, options: ExportOptions, journal: Journal) -> None:
        self.failures: list[Failure] = []
        self.elapsed_s = 0.0
        self._client = client
        self._options = options
        self._journal = journal
        self._threads = ThreadPoolExecutor(options.predicts, thread_name_prefix="splitsam-export")
        self._under_way: dict[Future[list[Mask]], TaskImage] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._threads.shutdown(cancel_futures=True)

    def run(self, images: Sequence[TaskImage]) -> None:
        """Ask about all images, past those that fail."""
        unanswered = {image.id: image for image in images}
        with Progress(len(images)) as progress:
            results = self._client.encode_many(
                [image.path for image in images], in_flight=self._options.encodes, stream_timeout_s=STREAM_TIMEOUT_S
            )
            try:
                for result in results:
                    image = images[result.position]
                    del unanswered[image.id]
                    self._take(result, image, progress)
            except SplitsamError as error:
                for image in unanswered.values():
                    self._settle(image_failure(str(image.path), error), progress)
            self._collect(0, progress)
            self.elapsed_s = progress.elapsed_s

    def _take(self, result: BulkResult, image: TaskImage, progress: Progress) -> None:
        """An image is encoded, or has failed."""
        encoded, path = result.image, str(image.path)
        if encoded is None or not encoded.stored:
            self._settle(image_failure(path, result.error), progress)
        elif (encoded.width_px, encoded.height_px) != image.size:
            found = f"is {encoded.width_px} x {encoded.height_px} pixels upright"
            said = "but its width and height say {} x {}".format(*image.size)
            self._settle(Failure(path, f"{found}, {said}", is_final=True), progress)
        else:
            asked = self._threads.submit(predict_image, self._client, encoded, image, self._options)
            self._under_way[asked] = image
            self._collect(2 * self._options.predicts - 1, progress)

    def _collect(self, most: int, progress: Progress) -> None:
        """Keep the masks of images that are done, until at most so many are under way."""
        while len(self._under_way) > most:
            for done in wait(self._under_way, return_when=FIRST_COMPLETED).done:
                image = self._under_way.pop(done)
                try:
                    masks = [describe_mask(mask) for mask in done.result()]
                except (SplitsamError, OSError) as error:
                    self._settle(image_failure(str(image.path), error), progress)
                    continue
                pairs = zip(image.tasks, masks, strict=True)
                self._journal.append({"masks": [[task.index, mask] for task, mask in pairs]})
                self._settle(None, progress)

    def _settle(self, failure: Failure | None, progress: Progress) -> None:
        self.failures += [] if failure is None else [failure]
        progress.update(None if failure is None else str(failure))


def predict_image(client: Client, encoded: EncodedImage, image: TaskImage, options: ExportOptions) -> list[Mask]:
    """A mask for each task, in their order; a request whose reply would be too large is cut in two.

    Raises:
        SplitsamError: a request was refused or failed.
    """
    output = output_options(options.form, options.selection, options.tolerance_px)
    prompts = [task.prompt for task in image.tasks]
    most = options.prompts_per_request
    waiting = deque(prompts[start : start + most] for start in range(0, len(prompts), most))
    masks: list[Mask] = []
    while waiting:
        asked = waiting.popleft()
        try:
            [answer] = client.predict_batch([(encoded, asked)], background=True, **output)
        except SplitsamError as error:
            if error.reason != "REPLY_TOO_LARGE" or len(asked) == 1:
                raise
            half = len(asked) // 2
            waiting.extendleft((asked[half:], asked[:half]))
        else:
            masks += [found[0] for found in answer.prompts]
    return masks
