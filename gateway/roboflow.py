"""Routes that answer as Roboflow's inference server does, for its `inference-sdk`.

Of several masks the best one is answered, as there. `image_id` is a name of the caller's own, which nothing is kept
under here: the SDK sends the image every time, and is recognised by its digest. A key that `embed_image` answered with
may stand in for the image. `save_logits_to_cache` and `load_logits_from_cache` change nothing.
"""

import asyncio
import contextlib
import io
import re
import time
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field, FiniteFloat

from splitsam.client.prompts import Format, OutputOptions, Prompt
from splitsam.client.results import EncodedImage, Mask
from splitsam.gateway.bodies import JSON_BODY, decoded, is_small, read_json
from splitsam.gateway.errors import GatewayError, bad_field
from splitsam.gateway.gateway import Gateway, gateway_of

Asked = TypeVar("Asked", bound="_Embed")
router = APIRouter(tags=["Roboflow"])
_KEY = re.compile(r"[0-9a-f]{64}")
_FORMATS: dict[str, list[Format]] = {"json": ["polygons"], "rle": ["rle"], "binary": ["bits", "low_res_logits"]}


class _Image(BaseModel):
    type: Literal["base64", "url"] = "base64"
    value: str


class _Embed(BaseModel):
    image: _Image | None = None
    image_id: str | None = Field(None, max_length=1024)
    api_key: str | None = Field(None, max_length=4096)


class _Box(BaseModel):
    """x and y are its centre."""

    x: FiniteFloat
    y: FiniteFloat
    width: FiniteFloat
    height: FiniteFloat


class _Point(BaseModel):
    x: FiniteFloat
    y: FiniteFloat
    positive: bool


class _Prompt(BaseModel):
    box: _Box | None = None
    points: list[_Point] | None = None


class _Prompts(BaseModel):
    prompts: list[_Prompt] | None = None


class _Segment(_Embed):
    prompts: _Prompts = _Prompts()
    multimask_output: bool = True
    format: Literal["json", "rle", "binary"] = "json"


@router.post("/sam2/embed_image", summary="Open an image", openapi_extra=JSON_BODY)
async def embed_image(request: Request) -> JSONResponse:
    """Takes `{image: {type: base64 | url, value}, image_id?}`, answers `{image_id, time}`, in seconds."""
    gateway = gateway_of(request)
    start_s = time.perf_counter()
    async with gateway.image_slots.one(request):
        asked = await _read(request, gateway, _Embed)
        if asked.image is None:
            raise bad_field("image", "is required")
        image = await _encoded(gateway, asked.image)
    answer = {"image_id": asked.image_id or image.key, "time": time.perf_counter() - start_s}
    return JSONResponse(answer, headers=_of_cache(image))


@router.post("/sam2/segment_image", summary="Masks for prompts on an image", openapi_extra=JSON_BODY)
async def segment_image(request: Request) -> Response:
    """Takes `{image, prompts: {prompts: [{box: {x, y, width, height}, points: [{x, y, positive}]}]}, format}`.

    A box's x and y are its centre. Answers `{predictions: [{masks, confidence, format}], time}`, one for each prompt;
    masks are polygons for the format json, COCO's RLE for rle; binary is an npz file with masks and low_res_masks.
    """
    gateway = gateway_of(request)
    start_s = time.perf_counter()
    if is_small(request):  # most likely with a key in the place of an image: that waits for nobody who sends one
        asked = await _read(request, gateway, _Segment)
        async with contextlib.nullcontext() if asked.image is None else gateway.image_slots.one():
            image, masks = await _masks(gateway, asked)
    else:
        async with gateway.image_slots.one(request):
            asked = await _read(request, gateway, _Segment)
            image, masks = await _masks(gateway, asked)
    headers = _of_cache(image) if isinstance(image, EncodedImage) else {}
    if asked.format == "binary":
        content = await asyncio.to_thread(_npz, masks)
        return Response(content, media_type="application/octet-stream", headers=headers)
    predictions = [_prediction(mask) for mask in masks]
    return JSONResponse({"predictions": predictions, "time": time.perf_counter() - start_s}, headers=headers)


async def _read(request: Request, gateway: Gateway, kind: type[Asked]) -> Asked:
    """The message, once its sender is known: by a header, or by the key inside."""
    asked = await read_json(request, kind)
    if request.scope["splitsam.tenant"] is None:
        gateway.access.admit(request.scope, asked.api_key)
        gateway.access.take_share(request.scope)
    return asked


async def _masks(gateway: Gateway, asked: _Segment) -> tuple[EncodedImage | str, list[Mask]]:
    """What the prompts were put to, and the mask of each."""
    if not asked.prompts.prompts:
        raise bad_field("prompts", "is empty; send at least one point or box")
    image = await _source(gateway, asked)
    prompts = [_prompt(f"prompts[{i}]", prompt, image) for i, prompt in enumerate(asked.prompts.prompts)]
    options = OutputOptions(selection="best" if asked.multimask_output else "single", formats=_FORMATS[asked.format])
    [found] = await gateway.client.predict_batch([(image, prompts)], **options)
    return image, [each[0] for each in found.prompts]


async def _source(gateway: Gateway, asked: _Segment) -> EncodedImage | str:
    if asked.image is not None:
        return await _encoded(gateway, asked.image)
    if asked.image_id is None or not _KEY.fullmatch(asked.image_id):
        raise bad_field("image", "is required; nothing is kept under an image_id of your own")
    return asked.image_id


async def _encoded(gateway: Gateway, image: _Image) -> EncodedImage:
    if image.type == "url":
        content = await gateway.fetcher.image(image.value)
    else:
        content = await decoded("image", image.value, gateway.settings.max_image_bytes)
    return await gateway.client.encode(content)


def _prompt(field: str, asked: _Prompt, image: EncodedImage | str) -> Prompt:
    if not asked.points and asked.box is None:
        raise bad_field(field, "is empty; send at least one point or box")
    points = [(point.x, point.y) for point in asked.points or ()]
    labels = [int(point.positive) for point in asked.points or ()]
    return Prompt(points, labels, None if asked.box is None else _corners(asked.box, image))


def _corners(box: _Box, image: EncodedImage | str) -> Sequence[float]:
    """x0, y0, x1, y1, cut off at the image's edges where these are known: a centre and a size are seldom exact."""
    corners = np.array([box.x, box.y, box.x, box.y])
    corners += np.array([-box.width, -box.height, box.width, box.height]) / 2
    far = np.array([image.width_px, image.height_px] * 2) if isinstance(image, EncodedImage) else np.inf
    cut: list[float] = np.clip(corners, 0, far).tolist()
    return cut


def _prediction(mask: Mask) -> dict[str, Any]:
    if mask.rle is not None:
        return {"masks": mask.rle, "confidence": mask.score, "format": "rle"}
    outlines = [polygon.outer.tolist() for polygon in mask.polygons or ()]
    return {"masks": outlines, "confidence": mask.score, "format": "polygon"}


def _npz(masks: Sequence[Mask]) -> bytes:
    file = io.BytesIO()
    pixels = np.stack([mask.to_array() for mask in masks])
    logits = np.stack([mask.to_logits() for mask in masks]).astype(np.float32)
    np.savez_compressed(file, masks=pixels, low_res_masks=logits)
    return file.getvalue()


def _of_cache(image: EncodedImage) -> dict[str, str]:
    return {"x-splitsam-cache-hit": str(image.cache_hit).lower()}


def error_form(error: GatewayError, _request_id: str) -> dict[str, Any]:
    return {"message": error.message, "error_type": error.reason}
