"""`POST /v1/masks`: a prompt on an image in, masks out."""

import time
from dataclasses import asdict

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from splitsam.client.prompts import Prompt
from splitsam.gateway.errors import bad_field
from splitsam.gateway.gateway import gateway_of
from splitsam.gateway.messages import ErrorAnswer, MasksAnswer, MasksRequest, PromptFields, masks_answer, rounded

router = APIRouter()


@router.post(
    "/v1/masks",
    summary="Masks for clicks, a box, or a mask to refine",
    response_model=MasksAnswer,
    response_model_exclude_none=True,
    responses={"default": {"model": ErrorAnswer}},
)
async def predict(request: Request, asked: MasksRequest) -> JSONResponse:
    """Every prompt stands for itself: send all points of an object each time.

    To refine a mask, ask for refinement_tokens, and send its token along with all points of the next prompt.
    """
    start_s = time.perf_counter()
    check_prompt(asked)
    [image] = await gateway_of(request).client.predict_batch(
        [(asked.key, [Prompt(**asked.prompt())])], **asked.options()
    )
    answer = {
        "width": image.width_px,
        "height": image.height_px,
        "masks": masks_answer(image.prompts[0]),
        "ms": round(1000 * (time.perf_counter() - start_s), 2),
        "timings": rounded(asdict(image.timings)),
    }
    return JSONResponse(answer)


def check_prompt(asked: PromptFields) -> None:
    """Raises GatewayError where there are not as many labels as points, or nothing to look for."""
    if asked.labels is not None and len(asked.labels) != len(asked.points):
        raise bad_field("labels", f"has {len(asked.labels)}; there are {len(asked.points)} points")
    if not asked.points and asked.box is None and asked.refinement_token is None:
        raise bad_field("points", "is empty; click at least once, or draw a box")
