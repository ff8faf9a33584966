"""`POST /v1/everything`: an image that was opened in, every mask in it out, a line of JSON each as they are found."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from splitsam.client.results import FoundMask
from splitsam.gateway.error_forms import as_gateway_error, own_form
from splitsam.gateway.errors import request_id_of
from splitsam.gateway.gateway import gateway_of
from splitsam.gateway.messages import ErrorAnswer, EverythingRequest, masks_answer

router = APIRouter()


@router.post(
    "/v1/everything",
    summary="Every mask in an image, without prompts",
    response_class=StreamingResponse,
    responses={
        200: {"content": {"application/x-ndjson": {}}, "description": "A mask a line, the best first"},
        "default": {"model": ErrorAnswer},
    },
)
async def generate(request: Request, asked: EverythingRequest) -> StreamingResponse:
    """A grid of points is looked at, and the masks worth keeping are answered as they are found, a JSON object a line.

    Each has what a mask of /v1/masks has, and the grid's "point" that it came from. The last line is {"done": {"masks",
    "ms"}}, or {"error"} where the search ended early. The search ends when the caller hangs up.
    """
    start_s = time.perf_counter()
    found = gateway_of(request).client.generate(asked.key, output=asked.options(), **asked.grid())
    masks = _until_hung_up(request, found)
    first = await anext(masks, None)  # what is refused is refused with a status of its own
    lines = _lines(masks, first, start_s, request_id_of(request.scope))
    return StreamingResponse(lines, media_type="application/x-ndjson")


async def _lines(
    masks: AsyncGenerator[FoundMask, None], mask: FoundMask | None, start_s: float, request_id: str
) -> AsyncIterator[str]:
    count = 0
    async with contextlib.aclosing(masks):
        try:
            while mask is not None:
                count += 1
                yield _line(masks_answer([mask.mask])[0] | {"point": mask.point})
                mask = await anext(masks, None)
        except Exception as error:  # noqa: BLE001 the status has been sent: the last line says it
            yield _line(own_form(as_gateway_error(error), request_id))
            return
    yield _line({"done": {"masks": count, "ms": round(1000 * (time.perf_counter() - start_s), 2)}})


async def _until_hung_up(request: Request, found: AsyncIterator[FoundMask]) -> AsyncGenerator[FoundMask, None]:
    """What is found, by a task of its own, so that a search for someone who has gone ends before its first mask."""
    queue: asyncio.Queue[FoundMask] = asyncio.Queue(1)

    async def search() -> None:
        async for mask in found:
            await queue.put(mask)

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    searching, gone = asyncio.create_task(search()), asyncio.create_task(hang_up())
    try:
        while not gone.done():
            upcoming = asyncio.create_task(queue.get())
            await asyncio.wait({upcoming, searching, gone}, return_when=asyncio.FIRST_COMPLETED)
            if upcoming.done():
                yield upcoming.result()
                continue
            upcoming.cancel()
            if searching.done() and queue.empty():
                searching.result()
                return
    finally:
        for task in (searching, gone):
            task.cancel()
        await asyncio.gather(searching, gone, return_exceptions=True)


def _line(message: dict[str, object]) -> str:
    return json.dumps(message, separators=(",", ":")) + "\n"
