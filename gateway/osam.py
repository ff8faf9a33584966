"""`POST /api/generate`, as osam's server answers it, for labelme and osam's own command line."""

import asyncio
import base64
import io
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import BaseModel, Field, FiniteFloat

from splitsam.client.results import Mask
from splitsam.gateway.bodies import JSON_BODY, decoded, read_json
from splitsam.gateway.errors import GatewayError, bad_field
from splitsam.gateway.gateway import gateway_of

router = APIRouter(tags=["osam"])
_FOREGROUND, _TOP_LEFT, _BOTTOM_RIGHT = 1, 2, 3


class _Prompt(BaseModel):
    points: list[tuple[FiniteFloat, FiniteFloat]] | None = None
    point_labels: list[Literal[0, 1, 2, 3]] | None = None
    texts: list[str] | None = None


class _Generate(BaseModel):
    model: str = Field(max_length=256)
    image: str | None = None
    image_embedding: Any = None
    prompt: _Prompt | None = None


@router.post("/api/generate", summary="The mask for a prompt on an image", openapi_extra=JSON_BODY)
async def generate(request: Request) -> JSONResponse:
    """Takes `{model, image, prompt: {points, point_labels}}`: the image in base64, labels 1 on the object, 0 not on it,
    2 and 3 the corners of a box. The model is the deployment's, whatever the name.

    Answers `{model, image_embedding: null, annotations: [{mask, bounding_box, score, text}]}`, the mask as a PNG in
    base64, cut out at the bounding box, whose edges are inside it.
    """
    gateway = gateway_of(request)
    async with gateway.image_slots.one(request):
        asked = await read_json(request, _Generate)
        if asked.image is None:
            raise bad_field("image", "is required; an image_embedding of another model is of no use here")
        content = await decoded("image", asked.image, gateway.settings.max_image_bytes)
        image = await gateway.client.encode(content)
        [mask] = await gateway.client.predict(
            image, **prompt_of(asked.prompt, image.width_px, image.height_px), formats=["bits"]
        )
    annotations = [] if mask.box is None else [await asyncio.to_thread(_annotation, mask)]
    return JSONResponse({"model": asked.model, "image_embedding": None, "annotations": annotations})


def prompt_of(asked: _Prompt | None, width_px: int, height_px: int) -> dict[str, Any]:
    """As the client takes it; without a prompt it is the image's centre, as in osam.

    Raises:
        GatewayError: points and labels do not go together, or a text was given.
    """
    if asked is None:
        return {"points": [(width_px / 2, height_px / 2)], "labels": [_FOREGROUND]}
    if asked.points is None or asked.point_labels is None:
        raise bad_field("prompt", "needs points and point_labels; this model does not understand texts")
    if len(asked.points) != len(asked.point_labels):
        raise bad_field("prompt", f"has {len(asked.points)} points and {len(asked.point_labels)} point_labels")
    pairs = list(zip(asked.points, asked.point_labels, strict=True))
    corners: dict[int, tuple[float, float]] = {
        label: point for point, label in pairs if label in (_TOP_LEFT, _BOTTOM_RIGHT)
    }
    clicks = [(point, label) for point, label in pairs if label not in (_TOP_LEFT, _BOTTOM_RIGHT)]
    if len(pairs) - len(clicks) not in (0, 2) or len(corners) not in (0, 2):
        raise bad_field("prompt", "needs one point labelled 2 and one labelled 3 for a box")
    box = (*corners[_TOP_LEFT], *corners[_BOTTOM_RIGHT]) if corners else None
    return {"points": [point for point, _ in clicks], "labels": [label for _, label in clicks], "box": box}


def _annotation(mask: Mask) -> dict[str, Any]:
    x0, y0, x1, y1 = (int(edge) for edge in mask.box or ())
    pixels = mask.to_array()[y0:y1, x0:x1].astype(np.uint8) * 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return {
        "bounding_box": {"xmin": x0, "ymin": y0, "xmax": x1 - 1, "ymax": y1 - 1},
        "text": None,
        "score": mask.score,
        "mask": base64.b64encode(file.getvalue()).decode("ascii"),
    }


def error_form(error: GatewayError, _request_id: str) -> dict[str, Any]:
    return {"detail": error.message}
