"""What the client does, step by step, without doing any I/O itself (see `steps`)."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from splitsam.client import answers
from splitsam.client.bulk import BulkEncode
from splitsam.client.connection import Connection
from splitsam.client.errors import SplitsamError
from splitsam.client.names import Address
from splitsam.client.prompts import (
    GridOptions,
    Image,
    OutputOptions,
    Prompts,
    everything_message,
    key_of,
    output_message,
    predict_request,
)
from splitsam.client.replicas import Replicas, call_any
from splitsam.client.results import DeploymentInfo, Embedding, EncodedImage, ImageMasks, ImageSource, ServiceInfo
from splitsam.client.retry import PATIENT, Renewals, RetryPolicy
from splitsam.client.steps import (
    ANY,
    Collect,
    Emit,
    Follow,
    Leave,
    Load,
    Operation,
    ReceiveBulk,
    Resolve,
    Tell,
    Unary,
    Wait,
)
from splitsam.v1 import decoder_pb2, encoder_pb2

# A thousand points take a laptop's CPU minutes.
EVERYTHING_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Operations:
    """The operations of one client.

    Args:
        connection: where to call.
        encode_timeout_s: deadline of looking up and encoding one image, waits included.
        predict_timeout_s: deadline of one predict, waits included; a re-encode in between has its own.
        retry: how often a call is sent when the server asks to come again.
        prefetch: whether the decoder of an image that was just encoded is told of it.
        clock: seconds, monotonic.
    """

    connection: Connection
    encode_timeout_s: float
    predict_timeout_s: float
    prefetch: bool = False
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    clock: Callable[[], float] = time.monotonic

    def encode(
        self, source: ImageSource, timeout_s: float | None = None, background: bool = False
    ) -> Operation[EncodedImage]:
        """Look the image up by its digest; upload it only if it is not encoded yet."""
        content, sha256 = yield Load(source)
        image = yield from self._encode_loaded(source, content, sha256, timeout_s, background=background)
        if self.prefetch and image.stored and not background:
            request = decoder_pb2.PrefetchEmbeddingRequest(embedding_key=image.key)
            decoders = yield from self.decoders_of(image).in_turn(self.predict_timeout_s)
            yield Tell("decoder", decoders[0], "PrefetchEmbedding", request, self.predict_timeout_s)
        return image

    def find(self, sha256: bytes, timeout_s: float | None = None) -> Operation[EncodedImage | None]:
        """Look an image up by its digest; None as well where nothing can be looked up, without a cache."""
        stored = yield from self._look_up(sha256, self._deadline_s(timeout_s, self.predict_timeout_s))
        return None if stored is None else answers.encoded_image(stored, None, sha256, cache_hit=True, stored=True)

    def encode_many(self, sources: Iterable[ImageSource], in_flight: int, stream_timeout_s: float) -> Operation[None]:
        """Emit a result for each image, over one stream."""
        encoders = yield Resolve(self.connection.encoders, self.encode_timeout_s)
        yield from BulkEncode(
            sources,
            in_flight,
            self.encode_timeout_s,
            stream_timeout_s,
            self._look_up_for_bulk,
            self._encoder_info,
            self.retry,
            replicas=len(encoders),
        ).steps()

    def predict(
        self,
        images: Sequence[Prompts],
        options: OutputOptions,
        timeout_s: float | None = None,
        *,
        background: bool = False,
    ) -> Operation[list[ImageMasks]]:
        """Masks for prompts on images, each asked of the decoder that its key belongs to, or of the next one."""
        time_s = self.predict_timeout_s if timeout_s is None else timeout_s
        groups: dict[Address, list[int]] = {}
        for position, (image, _) in enumerate(images):
            decoders = yield from self.decoders_of(image).in_turn(time_s)
            groups.setdefault(decoders[0], []).append(position)
        results: dict[int, ImageMasks] = {}
        for positions in groups.values():
            group = [images[position] for position in positions]
            masks = yield from self._predict_on(group, output_message(options), timeout_s, background)
            results.update(zip(positions, masks, strict=True))
        return [results[position] for position in range(len(images))]

    def generate(self, image: Image, grid: GridOptions, options: OutputOptions, timeout_s: float) -> Operation[None]:
        """Emit every mask of an image, with a fresh embedding where it is stale. Crops take the image itself."""
        output = output_message(options)
        content = (yield from self._load_unchanged(image)) if grid.get("crop_layers") else None
        deadline_s = self.clock() + timeout_s
        renewals = Renewals(self.clock() + self.predict_timeout_s, self.clock)
        attempt = 0
        away: set[Address] = set()
        while True:
            has_emitted = False
            decoders = yield from self.decoders_of(image).in_turn(max(deadline_s - self.clock(), 0.001))
            address = next((each for each in decoders if each not in away), decoders[0])
            left_s = max(deadline_s - self.clock(), 0.001)
            request = everything_message(content or key_of(image), grid, output)
            try:
                yield Follow("decoder", address, "GenerateMasks", request, left_s)
                while (message := (yield ReceiveBulk(left_s))) is not None:
                    has_emitted = True
                    yield Emit(answers.found_mask(message))
                return
            except SplitsamError as error:
                if has_emitted:
                    raise
                renewed = yield from self._renew(renewals, [(image, ())], error)
                if renewed is not None:
                    [(image, _)] = renewed
                    continue
                attempt += 1
                if error.is_of_one_replica:
                    away.add(address)
                    if not away.issuperset(decoders):
                        continue
                    away.clear()
                wait_s = self.retry.wait_s(error, attempt, deadline_s - self.clock(), replicas=len(decoders))
                if wait_s is None:
                    raise
                yield Wait(wait_s)

    def download(self, image: Image, timeout_s: float | None = None) -> Operation[Embedding]:
        """The embedding itself."""
        request = encoder_pb2.DownloadEmbeddingRequest(embedding_key=key_of(image))
        deadline_s = self._deadline_s(timeout_s, self.encode_timeout_s)
        step = Collect("encoder", ANY, "DownloadEmbedding", request, 0.0)
        _, chunks = yield from self._call(step, Replicas(self.connection.encoders, key_of(image)), deadline_s)
        return answers.embedding(chunks)

    def info(self, timeout_s: float | None = None, decoder: Address | None = None) -> Operation[DeploymentInfo]:
        """The model and the limits of every service, or of an encoder and this decoder.

        Every decoder that was given answers; of the several behind a name, those that are not away.
        """
        deadline_s = self._deadline_s(timeout_s, self.predict_timeout_s)
        encoder = answers.service_info("encoder", *(yield from self._encoder_info(timeout_s)))
        if decoder is not None:
            return DeploymentInfo(encoder, ((yield from self._decoder_info(decoder, deadline_s)),))
        decoders: list[ServiceInfo] = []
        for given in self.connection.decoders:
            decoders += yield from self._decoder_infos(given, deadline_s)
        return DeploymentInfo(encoder, tuple(decoders))

    def _decoder_infos(self, given: str, deadline_s: float) -> Operation[list[ServiceInfo]]:
        found: list[ServiceInfo] = []
        addresses: tuple[Address, ...] = yield Resolve((given,), deadline_s - self.clock())
        for address in addresses if len(addresses) > 1 else ():
            try:
                found.append((yield from self._decoder_info(address, deadline_s)))
            except SplitsamError as error:
                if not error.is_of_one_replica:
                    raise
        if not found:
            step = Unary("decoder", ANY, "GetModelInfo", decoder_pb2.DecoderServiceGetModelInfoRequest(), 0.0)
            address, answer = yield from self._call(step, Replicas((given,)), deadline_s)
            found.append(answers.service_info("decoder", address, answer))
        return found

    def _decoder_info(self, address: Address, deadline_s: float) -> Operation[ServiceInfo]:
        request = decoder_pb2.DecoderServiceGetModelInfoRequest()
        left_s = max(deadline_s - self.clock(), 0.001)
        answer = yield Unary("decoder", address, "GetModelInfo", request, left_s)
        return answers.service_info("decoder", address, answer)

    def _encoder_info(
        self, timeout_s: float | None = None
    ) -> Operation[tuple[Address, encoder_pb2.EncoderServiceGetModelInfoResponse]]:
        """The first encoder that answers, and what it says of itself."""
        step = Unary("encoder", ANY, "GetModelInfo", encoder_pb2.EncoderServiceGetModelInfoRequest(), 0.0)
        deadline_s = self._deadline_s(timeout_s, self.predict_timeout_s)
        return (yield from self._call(step, Replicas(self.connection.encoders), deadline_s))

    def encode_crop(
        self, content: bytes, sha256: bytes, crop: encoder_pb2.Crop | None, timeout_s: float
    ) -> Operation[EncodedImage]:
        """A crop of an image, or the whole, looked up first and encoded after what people wait for."""
        return (yield from self._encode_loaded(content, content, sha256, timeout_s, crop, background=True))

    def _encode_loaded(
        self,
        source: ImageSource,
        content: bytes,
        sha256: bytes,
        timeout_s: float | None,
        crop: encoder_pb2.Crop | None = None,
        background: bool = False,
    ) -> Operation[EncodedImage]:
        deadline_s = self._deadline_s(timeout_s, self.encode_timeout_s)
        stored = yield from self._look_up(sha256, deadline_s, crop)
        if stored is not None:
            return answers.encoded_image(stored, source, sha256, cache_hit=True, stored=True)
        request = encoder_pb2.EncodeImageRequest(image=content, crop=crop, background=background)
        upload = Unary("encoder", ANY, "EncodeImage", request, 0.0)
        made: encoder_pb2.EncodeImageResponse
        _, made = yield from self._call(upload, self._encoders_of(sha256), deadline_s)
        return answers.encoded_image(
            made.embedding, source, sha256, cache_hit=made.cache_hit, stored=made.stored, timings=made.timings
        )

    def _look_up(
        self, sha256: bytes, deadline_s: float, crop: encoder_pb2.Crop | None = None
    ) -> Operation[encoder_pb2.EmbeddingInfo | None]:
        """What the cache holds of an image or a crop; None as well when the encoder cannot look up, without a cache."""
        request = encoder_pb2.LookUpEmbeddingRequest(image_sha256=sha256, crop=crop)
        step = Unary("encoder", ANY, "LookUpEmbedding", request, 0.0)
        encoders = self._encoders_of(sha256)
        found: encoder_pb2.LookUpEmbeddingResponse
        try:
            _, found = yield from self._call(step, encoders, deadline_s, no_retry_on="CACHE_UNAVAILABLE")
        except SplitsamError as error:
            if error.reason != "CACHE_UNAVAILABLE":
                raise
            return None
        return found.embedding if found.found else None

    def _look_up_for_bulk(self, sha256: bytes) -> Operation[encoder_pb2.EmbeddingInfo | None]:
        """As `_look_up`; where that fails, the image is sent, and the stream meets whatever is wrong."""
        try:
            return (yield from self._look_up(sha256, self._deadline_s(None, self.encode_timeout_s)))
        except SplitsamError:
            return None

    def _predict_on(
        self, images: Sequence[Prompts], output: decoder_pb2.OutputOptions, timeout_s: float | None, background: bool
    ) -> Operation[list[ImageMasks]]:
        """One request, with fresh embeddings where those are stale; once without tokens if those have expired."""
        may_drop_tokens = True
        renewals = Renewals(self._deadline_s(timeout_s, self.predict_timeout_s), self.clock)
        decoders = self.decoders_of(images[0][0])
        while True:
            request = predict_request(images, output, background=background)
            step = Unary("decoder", ANY, "PredictMasks", request, 0.0)
            deadline_s = self._deadline_s(timeout_s, self.predict_timeout_s)
            try:
                _, response = yield from self._call(step, decoders, deadline_s, is_patient=background)
            except SplitsamError as error:
                renewed = yield from self._renew(renewals, images, error)
                if renewed is not None:
                    images = renewed
                elif error.reason == "REFINEMENT_EXPIRED" and may_drop_tokens:
                    may_drop_tokens = False
                    images = _without_tokens(images, error)
                else:
                    raise
            else:
                return answers.image_masks(response)

    def _renew(
        self, renewals: Renewals, images: Sequence[Prompts], error: SplitsamError
    ) -> Operation[list[Prompts] | None]:
        """The images with fresh embeddings, or None where those would not help against this error."""
        wait_s = renewals.wait_s(error)
        if wait_s is None:
            return None
        if renewals.has_been_in_vain:
            yield Leave()
        yield Wait(wait_s)
        return (yield from self._encode_again(images, error))

    def _encode_again(self, images: Sequence[Prompts], error: SplitsamError) -> Operation[list[Prompts]]:
        """Encode every image whose source is at hand and unchanged; those still in the cache cost a look-up each."""
        renewed: list[Prompts] = []
        for image, prompts in images:
            fresh = image
            if isinstance(image, EncodedImage) and image.source is not None:
                try:
                    content, sha256 = yield Load(image.source)
                except OSError as unreadable:
                    raise error from unreadable
                if sha256 == image.sha256:
                    fresh = yield from self._encode_loaded(image.source, content, sha256, None)
            renewed.append((fresh, prompts))
        if all(fresh is image for (fresh, _), (image, _) in zip(renewed, images, strict=True)):
            raise error
        return renewed

    def _load_unchanged(self, image: Image) -> Operation[bytes]:
        if not isinstance(image, EncodedImage) or image.source is None:
            raise ValueError("crops need the image: pass what encode returned, not a key")
        content, sha256 = yield Load(image.source)
        if sha256 != image.sha256:
            raise ValueError("the image is no longer the one that was encoded")
        return bytes(content)

    def _call(
        self,
        step: Unary | Collect,
        replicas: Replicas,
        deadline_s: float,
        no_retry_on: str = "",
        *,
        is_patient: bool = False,
    ) -> Operation[tuple[Address, Any]]:
        """Who answered, and what; see `call_any`."""
        retry = PATIENT if is_patient else self.retry
        return call_any(step, replicas, deadline_s, retry=retry, clock=self.clock, no_retry_on=no_retry_on)

    def _deadline_s(self, timeout_s: float | None, default_s: float) -> float:
        return self.clock() + (default_s if timeout_s is None else timeout_s)

    def _encoders_of(self, sha256: bytes) -> Replicas:
        return Replicas(self.connection.encoders, sha256.hex())

    def decoders_of(self, image: Image) -> Replicas:
        """An image's prompts all go to one, whose memory holds it."""
        return Replicas(self.connection.decoders, key_of(image))


def _without_tokens(images: Sequence[Prompts], error: SplitsamError) -> list[Prompts]:
    replayed: list[Prompts] = []
    for image, prompts in images:
        kept = [prompt.without_token() for prompt in prompts]
        if None in kept:
            raise error
        replayed.append((image, [prompt for prompt in kept if prompt is not None]))
    return replayed
