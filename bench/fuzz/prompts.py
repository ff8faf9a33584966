"""Requests of both services, from the bytes on the wire to what the model is asked for."""

import math
from collections.abc import Callable
from random import Random

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError

from bench.fuzz import images
from bench.fuzz.messages import HEIGHT, WIDTH, is_path, make_bytes
from bench.fuzz.target import Broken, refusal
from splitsam.common.errors import ServiceError
from splitsam.common.records import parse_key
from splitsam.decoder_service.crops import cut_into_views
from splitsam.decoder_service.everything_messages import SearchLimits, parse_everything, parse_origin
from splitsam.decoder_service.everything_request import EverythingRequest, count_points
from splitsam.decoder_service.messages import check_reply_can_fit, parse_request
from splitsam.decoder_service.prompts import OutputOptions, PredictRequest, PromptLimits, validate_in_image
from splitsam.decoder_service.settings import DecoderSettings
from splitsam.v1 import decoder_pb2, encoder_pb2

_DEFAULTS = DecoderSettings.model_fields
LIMITS = PromptLimits(
    max_images=_DEFAULTS["max_images_per_request"].default,
    max_prompts=_DEFAULTS["max_prompts_per_request"].default,
    max_points=_DEFAULTS["max_points_per_prompt"].default,
)
SEARCH_LIMITS = SearchLimits(
    max_image_bytes=_DEFAULTS["max_image_bytes"].default,
    max_crop_layers=_DEFAULTS["max_crop_layers"].default,
    max_grid_points=LIMITS.max_prompts,
    max_points=_DEFAULTS["max_points_per_search"].default,
)
_MAX_REPLY_BYTES = _DEFAULTS["max_reply_bytes"].default
PREDICT = decoder_pb2.PredictMasksRequest.DESCRIPTOR
GENERATE = decoder_pb2.GenerateMasksRequest.DESCRIPTOR
NO_MESSAGE = "no message"


def maker(descriptor: Descriptor) -> Callable[[Random], bytes]:
    return lambda random: make_bytes(random, descriptor)


def check_predict(data: bytes) -> str:
    """`PredictMasks`: prompts that the model can take, or a refusal of a field of the request."""
    try:
        message = decoder_pb2.PredictMasksRequest.FromString(data)
    except DecodeError:
        return NO_MESSAGE
    try:
        request = parse_request(message, LIMITS)
        for i, image in enumerate(request.images):
            validate_in_image(image, i, width=WIDTH, height=HEIGHT)
        check_reply_can_fit(request, [(HEIGHT, WIDTH)] * len(request.images), _MAX_REPLY_BYTES)
    except ServiceError as error:
        return refusal(error, lambda field: is_path(PREDICT, field))
    _check_prompts(request, message)
    return "accepted"


def check_generate(data: bytes) -> str:
    """`GenerateMasks`: grids, crops and thresholds that make sense, or a refusal of a field of the request."""
    try:
        message = decoder_pb2.GenerateMasksRequest.FromString(data)
    except DecodeError:
        return NO_MESSAGE
    try:
        origin = parse_origin(message, SEARCH_LIMITS)
        request = parse_everything(message, SEARCH_LIMITS)
        views = cut_into_views((HEIGHT, WIDTH), len(request.grids) - 1, request.overlap_ratio)
    except ServiceError as error:
        return refusal(error, lambda field: is_path(GENERATE, field))
    if isinstance(origin, str) and (parse_key(origin) is None or len(views) > 1):
        raise Broken(f"{len(views)} views of the key {origin!r}")
    for x0, y0, x1, y1 in (view.box for view in views):
        if not (0 <= x0 < x1 <= WIDTH and 0 <= y0 < y1 <= HEIGHT):
            raise Broken(f"a view of {x0}, {y0}, {x1}, {y1}")
    _check_everything(request)
    return "accepted"


def make_encoder_request(random: Random) -> bytes:
    """A request of one of the encoder's methods; the first byte says of which."""
    number = random.randrange(len(_ENCODER_REQUESTS))
    kind = _ENCODER_REQUESTS[number]
    if "image" in kind.DESCRIPTOR.fields_by_name and random.random() < 0.5:
        message = kind(image=images.make(random))
        if isinstance(message, encoder_pb2.EncodeImageRequest) and random.random() < 0.3:
            message.crop.CopyFrom(_make_crop(random))
        return bytes([number]) + message.SerializeToString()
    return bytes([number]) + make_bytes(random, kind.DESCRIPTOR)


def check_encoder_request(data: bytes) -> str:
    """The encoder's requests: an image or a key that can be used, or a refusal of its field."""
    kind = _ENCODER_REQUESTS[data[0] % len(_ENCODER_REQUESTS)] if data else _ENCODER_REQUESTS[0]
    try:
        message = kind.FromString(data[1:])
    except DecodeError:
        return NO_MESSAGE
    if isinstance(message, encoder_pb2.DownloadEmbeddingRequest):
        key = parse_key(message.embedding_key)
        if key is not None and key.hex() != message.embedding_key:
            raise Broken(f"{message.embedding_key!r} was read as {key.hex()}")
        return "accepted" if key else "refused key"
    if isinstance(message, encoder_pb2.EncodeImageRequest) and message.HasField("crop"):
        crop = message.crop
        return images.check(message.image, (crop.x0, crop.y0, crop.x1, crop.y1))
    return images.check(message.image)


def _make_crop(random: Random) -> encoder_pb2.Crop:
    x0, y0 = (random.choice((0, 0, 1, 7, 100)) for _ in range(2))
    x1, y1 = (random.choice((0, 1, 8, 16, 640, 2**32 - 1)) for _ in range(2))
    return encoder_pb2.Crop(x0=x0, y0=y0, x1=x1, y1=y1)


def _check_prompts(request: PredictRequest, message: decoder_pb2.PredictMasksRequest) -> None:
    prompts = [prompt for image in request.images for prompt in image.prompts]
    asked = [prompt for image in message.images for prompt in image.prompts]
    keys = [parse_key(image.embedding_key) for image in request.images]
    if None in keys or len(set(keys)) != len(keys) or not 1 <= len(keys) <= LIMITS.max_images:
        raise Broken(f"keys {keys}")
    if len(prompts) != len(asked) or not len(keys) <= len(prompts) <= LIMITS.max_prompts:
        raise Broken(f"{len(prompts)} prompts from {len(asked)}")
    for prompt in prompts:
        inside = [0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in prompt.points.tolist()]
        if not all(inside) or len(inside) > LIMITS.max_points or not set(prompt.labels.tolist()) <= {0, 1}:
            raise Broken(f"points {prompt.points.tolist()} with labels {prompt.labels.tolist()}")
        if prompt.box is not None:
            x0, y0, x1, y1 = prompt.box.tolist()
            if not (0 <= x0 < x1 <= WIDTH and 0 <= y0 < y1 <= HEIGHT):
                raise Broken(f"box {prompt.box}")
        if prompt.mask_input is not None and not math.isfinite(float(prompt.mask_input.sum())):
            raise Broken("logits that are not finite")
        if not inside and prompt.box is None and prompt.mask_input is None and not prompt.refinement_token:
            raise Broken("a prompt of nothing")
    _check_output(request.output)


def _check_everything(request: EverythingRequest) -> None:
    thresholds = request.thresholds
    for grid in request.grids:
        if grid.ndim != 2 or grid.shape[1] != 2 or not 1 <= len(grid) <= SEARCH_LIMITS.max_grid_points:
            raise Broken(f"a grid of {grid.shape}")
        if not bool(((grid >= 0) & (grid <= 1)).all()):
            raise Broken("a grid outside the image")
    if len(request.grids) > 1 + SEARCH_LIMITS.max_crop_layers or count_points(request.grids) > SEARCH_LIMITS.max_points:
        raise Broken(f"{len(request.grids)} grids of {count_points(request.grids)} points")
    shares = (thresholds.predicted_iou, thresholds.stability_score, thresholds.box_nms, thresholds.crop_nms)
    if not all(0 <= share <= 1 for share in shares) or not 0 <= thresholds.stability_offset <= 100:
        raise Broken(f"{thresholds}")
    if request.points_per_batch is not None and request.points_per_batch < 1:
        raise Broken(f"{request.points_per_batch} points a batch")
    _check_output(request.output)


def _check_output(output: OutputOptions) -> None:
    if not 0 <= output.polygon_tolerance_px <= 100 or not -100 <= output.mask_threshold <= 100 or not output.formats:
        raise Broken(f"{output}")


_ENCODER_REQUESTS = (
    encoder_pb2.EncodeImageRequest,
    encoder_pb2.EncodeImagesRequest,
    encoder_pb2.DownloadEmbeddingRequest,
)
