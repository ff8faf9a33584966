"""Label Studio's ML backend: a click or a rectangle on a task's image becomes a brush mask or polygons.

Nothing is kept of a project between requests: Label Studio sends its labeling setup along with every prediction, and
where its images are is a setting.
"""

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from splitsam.client.errors import SplitsamError
from splitsam.client.prompts import OutputOptions
from splitsam.client.results import EncodedImage, Mask
from splitsam.gateway.errors import GatewayError
from splitsam.gateway.gateway import Gateway, gateway_of
from splitsam.gateway.label_config import Control, LabelConfig, parse_config
from splitsam.gateway.label_prompts import Drawn, read_drawn
from splitsam.gateway.label_regions import format_for, regions

router = APIRouter(tags=["Label Studio"])
ROUTES = ("/health", "/setup", "/predict", "/webhook", "/train", "/versions")
# Label Studio waits three seconds for a set-up.
_SETUP_S = 2.5
_RENEWED = ("EMBEDDING_EXPIRED", "MODEL_MISMATCH")


class _Setup(BaseModel):
    project: str = Field("", max_length=256)
    label_config: str = Field("", alias="schema", max_length=2**20)


class _Context(BaseModel):
    result: list[dict[str, Any]] | None = None


class _Params(BaseModel):
    context: _Context | None = None


class _Predict(BaseModel):
    tasks: list[dict[str, Any]]
    project: str = Field("", max_length=256)
    label_config: str = Field(max_length=2**20)
    params: _Params = _Params()


@router.post("/setup", summary="A project takes this backend")
async def setup(request: Request, asked: _Setup) -> JSONResponse:
    """Checks the project's labeling setup, and begins to encode the images of its tasks in the background.

    Takes `{project, schema}`, answers `{model_version}`. The address and the token that Label Studio sends along are
    not used: what the gateway calls, and with which token, is said by its own settings.
    """
    gateway = gateway_of(request)
    info = await gateway.info(_SETUP_S)
    if asked.label_config:
        config = parse_config(asked.label_config)
        number = asked.project.partition(".")[0]
        if number.isdecimal() and gateway.settings.label_studio_url is not None:
            gateway.encode_ahead.start(int(number), config)
    return JSONResponse({"model_version": _version(info.encoder.model_id)})


@router.post("/predict", summary="Masks for what an annotator drew")
async def predict(request: Request, asked: _Predict) -> JSONResponse:
    """Takes `{tasks, label_config, params: {context: {result}}}`, answers `{results: [{result, score}]}`.

    Keypoints and rectangles of the context are one prompt on the first task's image; the answer holds regions for the
    BrushLabels or PolygonLabels that have its label. Without a context there is nothing to look for, and no result.
    """
    gateway = gateway_of(request)
    config = parse_config(asked.label_config)
    context = asked.params.context
    drawn = read_drawn(context.result) if context is not None and context.result else None
    if drawn is None or not asked.tasks:
        return JSONResponse({"results": []})
    control = config.control_for(drawn.label)
    model_id, mask = await _mask(gateway, asked.tasks[0], config, drawn, control)
    found = await asyncio.to_thread(regions, mask, control, config.image_name, drawn.label)
    return JSONResponse({"results": [{"result": found, "score": mask.score, "model_version": _version(model_id)}]})


@router.post("/webhook", summary="What happened in a project")
@router.post("/train", summary="Asks to learn from annotations")
async def webhook() -> JSONResponse:
    """Accepted, and nothing comes of it: the model does not learn."""
    return JSONResponse({"status": "ok", "message": "This model does not learn from annotations."})


@router.get("/versions", summary="The versions of the model")
async def versions(request: Request) -> JSONResponse:
    info = await gateway_of(request).info(_SETUP_S)
    return JSONResponse({"versions": [_version(info.encoder.model_id)]})


async def _mask(
    gateway: Gateway, task: dict[str, Any], config: LabelConfig, drawn: Drawn, control: Control
) -> tuple[str, Mask]:
    """The model's id, and its mask. An image that was opened lately may be gone by now: then it is opened afresh."""
    output = OutputOptions(formats=[format_for(control)])
    image = gateway.task_images.remembered(task, config)
    if image is not None:  # none of it is in memory, so that nobody who sends one is waited for
        try:
            return image.model_id, await _predicted(gateway, image, drawn, output)
        except SplitsamError as error:
            if error.reason not in _RENEWED:
                raise
    async with gateway.image_slots.one():
        image = await gateway.task_images.open(task, config)
        return image.model_id, await _predicted(gateway, image, drawn, output)


async def _predicted(gateway: Gateway, image: EncodedImage, drawn: Drawn, output: OutputOptions) -> Mask:
    prompt = drawn.prompt(image.width_px, image.height_px)
    [found] = await gateway.client.predict_batch([(image, [prompt])], **output)
    return found.prompts[0][0]


def _version(model_id: str) -> str:
    return f"splitsam-{model_id[:8]}"


def error_form(error: GatewayError, request_id: str) -> dict[str, Any]:
    return {"error": error.message, "reason": error.reason, "request_id": request_id}
