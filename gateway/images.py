"""`POST /v1/images`: an image file in, the key of its embedding out."""

import time
from typing import Annotated

from fastapi import APIRouter, Path, Request
from fastapi.responses import JSONResponse

from splitsam.gateway.errors import GatewayError, bad_field
from splitsam.gateway.gateway import gateway_of
from splitsam.gateway.messages import ErrorAnswer, ImageAnswer, image_answer

router = APIRouter()
_FILE = {"schema": {"type": "string", "format": "binary"}}
_BODY = {"required": True, "content": {"image/jpeg": _FILE, "image/png": _FILE, "image/webp": _FILE}}


@router.post(
    "/v1/images",
    summary="Open an image",
    response_model=ImageAnswer,
    responses={"default": {"model": ErrorAnswer}},
    openapi_extra={"requestBody": _BODY},
)
async def open_image(request: Request) -> JSONResponse:
    """Encodes an image, or finds that it is encoded already: the body is the file itself, JPEG, PNG or WebP.

    Its key is good for as long as the embedding is kept, usually a day after the last click; then calls answer
    EMBEDDING_EXPIRED, and the image has to be opened again. Opening the same file again is quick.
    """
    gateway = gateway_of(request)
    async with gateway.image_slots.one(request):
        content = await request.body()
        if not content:
            raise bad_field("image", "is empty; the body has to be a JPEG, PNG or WebP file")
        start_s = time.perf_counter()
        image = await gateway.client.encode(content)
    return JSONResponse(image_answer(image, 1000 * (time.perf_counter() - start_s)))


@router.get(
    "/v1/images/{sha256}",
    summary="Open an image that was opened before, without sending it",
    response_model=ImageAnswer,
    responses={"default": {"model": ErrorAnswer}},
)
async def find_image(
    request: Request, sha256: Annotated[str, Path(pattern="^[0-9a-f]{64}$", description="Of the file, 64 hex digits")]
) -> JSONResponse:
    """Answers as opening it would if somebody did lately, else 404 and NOT_ENCODED: then send the file."""
    start_s = time.perf_counter()
    image = await gateway_of(request).client.find(bytes.fromhex(sha256))
    if image is None:
        raise GatewayError(404, "NOT_ENCODED", "This image was not opened here lately: send the file.")
    return JSONResponse(image_answer(image, 1000 * (time.perf_counter() - start_s)))
