"""Requests that carry an image inside JSON: read and decoded on a thread, for they may have tens of megabytes."""

import asyncio
import base64
import binascii
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel

from splitsam.gateway.errors import bad_field, too_large

Asked = TypeVar("Asked", bound=BaseModel)
# Around an image in base64.
_JSON_BYTES = 2**20
# Of a request without one.
SMALL_BYTES = 2**20

JSON_BODY: dict[str, Any] = {"requestBody": {"required": True, "content": {"application/json": {"schema": {}}}}}


def json_limit(max_image_bytes: int) -> int:
    """The most bytes of a request with one image."""
    return max_image_bytes * 4 // 3 + _JSON_BYTES


def is_small(request: Request) -> bool:
    """Whether a request is known to be one, before any of its body is read."""
    announced = request.headers.get("content-length", "")
    return announced.isdecimal() and int(announced) <= SMALL_BYTES and "transfer-encoding" not in request.headers


async def read_json(request: Request, kind: type[Asked]) -> Asked:
    """Raises ValidationError where the body is no such message."""
    return await asyncio.to_thread(kind.model_validate_json, await request.body())


async def decoded(field: str, text: str, max_bytes: int) -> bytes:
    """The bytes of an image in base64, with or without the head of a data URL.

    Raises:
        GatewayError: it is none, or too large.
    """
    return await asyncio.to_thread(_decode, field, text, max_bytes)


def _decode(field: str, text: str, max_bytes: int) -> bytes:
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise bad_field(field, "is not an image file in base64") from None
    if not content:
        raise bad_field(field, "is empty")
    if len(content) > max_bytes:
        raise too_large("The image", max_bytes)
    return content
