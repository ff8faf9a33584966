"""The synchronous client."""

from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

from splitsam.client.connection import DEFAULT_DECODER, DEFAULT_ENCODER, TLS, connection
from splitsam.client.operations import EVERYTHING_TIMEOUT_S, Operations
from splitsam.client.prompts import GridOptions, Image, MaskInput, OutputOptions, Prompt, Prompts
from splitsam.client.results import (
    BulkResult,
    DeploymentInfo,
    Embedding,
    EncodedImage,
    FoundMask,
    ImageMasks,
    ImageSource,
    Mask,
)
from splitsam.client.transport import Transport


class Client:
    """Segment Anything on a splitsam deployment; safe to share between threads.

    Every call has a deadline. Where the server is full or not ready and says when to come again, the call waits
    exactly that long, a few times, within its deadline. Of several replicas, one that is gone, loading or draining is
    passed over for the next at once. Other failures are raised at once as `SplitsamError`.

    Args:
        encoder: host:port of the encoder service, or of several replicas; a name that resolves to several hosts stands
            for all of them, and is looked up again every few seconds. An image always goes to the same one.
        decoder: likewise, of the decoder service; an image's prompts always go to the same one.
        token: sent as `authorization: Bearer` with every call.
        tls: True for TLS with the system's authorities, or a `TLS` with files; None for plain text.
        encode_timeout_s: deadline of encoding an image.
        predict_timeout_s: deadline of a predict; a re-encode that it needs has its own.
        prefetch: after `encode`, tell the decoder of that image to hold its embedding ready for the first prompt;
            nobody waits for it, and its failure goes unnoticed.
    """

    def __init__(
        self,
        encoder: str | Sequence[str] = DEFAULT_ENCODER,
        decoder: str | Sequence[str] = DEFAULT_DECODER,
        *,
        token: str | None = None,
        tls: TLS | bool | None = None,
        encode_timeout_s: float = 30.0,
        predict_timeout_s: float = 10.0,
        prefetch: bool = True,
    ) -> None:
        where = connection(encoder, decoder, token, tls)
        self._operations = Operations(where, encode_timeout_s, predict_timeout_s, prefetch)
        self._transport = Transport(where)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._transport.close()

    def encode(self, image: ImageSource, *, timeout_s: float | None = None, background: bool = False) -> EncodedImage:
        """Encode an image, given as a path or as the bytes of its file; uploaded only if it is not encoded yet.

        Args:
            background: nobody waits for it: images of people who do go first.

        Raises:
            SplitsamError: the image was refused, or the service failed.
            OSError: the file cannot be read.
        """
        return self._transport.run(self._operations.encode(image, timeout_s, background))

    def find(self, sha256: bytes, *, timeout_s: float | None = None) -> EncodedImage | None:
        """An image that is encoded already, by the SHA-256 of its file; None if it is not. It does not know its source.

        Raises:
            SplitsamError: the service failed.
        """
        return self._transport.run(self._operations.find(sha256, timeout_s))

    def predict(
        self,
        image: Image,
        *,
        points: Any = (),
        labels: Any = None,
        box: Any = None,
        mask_input: MaskInput | None = None,
        timeout_s: float | None = None,
        **output: Unpack[OutputOptions],
    ) -> Sequence[Mask]:
        """Masks for one prompt: one, or three with `selection="all"`.

        An embedding that has expired is encoded again once, if `image` is a handle that knows its source; one that
        another model made, until both services are of one model, within the deadline. A
        refinement token that has expired is dropped once and the prompt sent without it: the answer is then the
        prompt's own mask, unrefined, unless `mask_input` is a `Mask` that carries its logits.

        Args:
            image: what `encode` returned, or an embedding key.
            points, labels, box, mask_input: see `Prompt`.
            timeout_s: instead of the client's own.
            output: see `OutputOptions`.
        """
        prompt = Prompt(points, labels, box, mask_input)
        return self._transport.run(self._operations.predict([(image, [prompt])], output, timeout_s))[0].prompts[0]

    def predict_batch(
        self,
        images: Sequence[Prompts],
        *,
        timeout_s: float | None = None,
        background: bool = False,
        **output: Unpack[OutputOptions],
    ) -> list[ImageMasks]:
        """Masks for any number of prompts on one or several images, in their order.

        Args:
            images: pairs of an image (what `encode` returned, or a key) and its prompts, each image once.
            background: nobody waits for it: clicks go first, and a queue that stays full is waited for longer.
            output: see `OutputOptions`.
        """
        return self._transport.run(self._operations.predict(images, output, timeout_s, background=background))

    def generate(
        self,
        image: Image,
        *,
        output: OutputOptions | None = None,
        timeout_s: float = EVERYTHING_TIMEOUT_S,
        **grid: Unpack[GridOptions],
    ) -> Iterator[FoundMask]:
        """Everything in an image without prompts, highest predicted IoU first; a list with `list(...)`.

        Masks come once the whole image was searched. Closing the iterator, or leaving the client, ends the search. An
        embedding that has expired is encoded again once, if `image` is a handle that knows its source. With crops
        the image itself is sent, and the decoder service has them encoded.

        Args:
            image: what `encode` returned, or, without crops, an embedding key.
            output: see `OutputOptions`; the selection does not apply.
            timeout_s: of the whole search.
            grid: see `GridOptions`.

        Raises:
            SplitsamError: the search was refused or failed; masks that were handed out before are good.
            ValueError: crops of a key alone, or of an image that has changed since.
        """
        return self._transport.results(self._operations.generate(image, grid, output or {}, timeout_s))

    def encode_many(
        self, images: Iterable[ImageSource], *, in_flight: int = 8, stream_timeout_s: float = 3600.0
    ) -> Iterator[BulkResult]:
        """Encode those of many images that are not yet, over one stream; results, errors too, come as they are ready.

        Args:
            images: taken as room comes, so a generator over a large folder is read lazily.
            in_flight: images sent and not yet answered at most, each of them in memory; fewer while the queue is full.
            stream_timeout_s: deadline of the whole stream; the server's silence is bounded by `encode_timeout_s`.

        Raises:
            SplitsamError: the stream itself failed; results that were not handed out are lost, encoding again is a hit.
        """
        return self._transport.results(self._operations.encode_many(images, in_flight, stream_timeout_s))

    def download_embedding(self, image: Image, *, timeout_s: float | None = None) -> Embedding:
        """The embedding itself, for a decoder of your own."""
        return self._transport.run(self._operations.download(image, timeout_s))

    def info(self, *, timeout_s: float | None = None) -> DeploymentInfo:
        """The model and the limits of an encoder and of every decoder; of those behind a name, that are not away."""
        return self._transport.run(self._operations.info(timeout_s))
