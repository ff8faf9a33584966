"""`/v1/pointer`: a WebSocket for a pointer that hovers over an image; a newer position supersedes those that wait.

The first message is `messages.PointerStart`, every other one `messages.Position`. Each position is answered once, with
`{"id", "masks", "ms"}`, `{"id", "superseded_by"}` or `{"id", "error"}`; what is wrong with the start, or ends the
pointer, is answered with `{"error"}` alone. Another image takes another WebSocket.
"""

import asyncio
import contextlib
import json
import time
from typing import Any, TypeVar

from fastapi import APIRouter, WebSocket
from pydantic import BaseModel, ValidationError
from starlette.websockets import WebSocketDisconnect

from splitsam.client.errors import stream_ended
from splitsam.client.pointer import Pointer
from splitsam.client.results import PointerAnswer
from splitsam.common.tasks import gather_or_cancel
from splitsam.gateway.access import check_again
from splitsam.gateway.error_forms import as_gateway_error, own_form
from splitsam.gateway.errors import GatewayError, from_service, request_id_of
from splitsam.gateway.gateway import Gateway, gateway_of
from splitsam.gateway.masks import check_prompt
from splitsam.gateway.messages import PointerStart, Position, masks_answer

router = APIRouter()
Asked = TypeVar("Asked", bound=BaseModel)
_REFUSED, _TRY_AGAIN = 1008, 1013  # codes of a close: policy violation, try again later
_START_S = 10.0
_NO_START = GatewayError(408, "NO_START", "The first message, which names the image, did not come.")


@router.websocket("/v1/pointer")
async def follow(socket: WebSocket) -> None:
    gateway = gateway_of(socket)
    await socket.accept()
    try:
        start = await _start(socket)
        if socket.scope["splitsam.tenant"] is None:
            gateway.access.admit(socket.scope, start.token)
        gateway.access.take_share(socket.scope)
        async with gateway.client.pointer(start.key, **start.options()) as pointer:
            hover = _Hover(socket, pointer, gateway)
            await gather_or_cancel((hover.listen(), hover.answer()))
    except WebSocketDisconnect:
        return
    except Exception as error:
        known = as_gateway_error(error)
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # it may have gone meanwhile
            await socket.send_text(_text(own_form(known, request_id_of(socket.scope))))
            await socket.close(_TRY_AGAIN if known.status_code >= 500 or known.status_code == 429 else _REFUSED)
        if known.reason == "INTERNAL":
            raise


async def _start(socket: WebSocket) -> PointerStart:
    try:
        async with asyncio.timeout(_START_S):
            return await _received(socket, PointerStart)
    except TimeoutError as error:
        raise _NO_START from error


class _Hover:
    """One pointer on its way through: positions to the decoder, answers back."""

    def __init__(self, socket: WebSocket, pointer: Pointer, gateway: Gateway):
        self._socket = socket
        self._pointer = pointer
        self._metrics = gateway.metrics
        self._asked: dict[int, tuple[int, float]] = {}
        self._sending = asyncio.Lock()  # an answer may be here before its request's id is known

    async def listen(self) -> None:
        """Hand positions on until the caller goes, which raises WebSocketDisconnect."""
        while True:
            position_id = None
            try:
                position = await _received(self._socket, Position)
                position_id = position.id
                check_prompt(position)
            except (ValidationError, GatewayError) as error:
                await self._refuse(position_id, as_gateway_error(error))
                continue
            check_again(self._socket.scope)
            start_s = time.perf_counter()
            async with self._sending:
                request_id = await self._pointer.send(**position.prompt())
                self._asked[request_id] = (position.id, start_s)

    async def answer(self) -> None:
        """Hand answers back until the decoder ends the stream, which raises SplitsamError."""
        async for answer in self._pointer:
            async with self._sending:
                position_id, start_s = self._asked.pop(answer.request_id)
            if answer.error is not None:
                await self._refuse(position_id, from_service(answer.error))
            else:
                outcome = self._outcome(answer, start_s)
                await self._socket.send_text(_text({"id": position_id} | outcome))
        raise stream_ended("the decoder ended the pointer")

    def _outcome(self, answer: PointerAnswer, start_s: float) -> dict[str, Any]:
        if answer.superseded_by is not None:
            self._metrics.positions.labels("superseded").inc()
            newer = self._asked.get(answer.superseded_by)
            return {"superseded_by": newer[0] if newer else None}
        self._metrics.positions.labels("answered").inc()
        return {"masks": masks_answer(answer.masks), "ms": round(1000 * (time.perf_counter() - start_s), 2)}

    async def _refuse(self, position_id: int | None, error: GatewayError) -> None:
        self._metrics.positions.labels("failed").inc()
        form = own_form(error, request_id_of(self._socket.scope))
        await self._socket.send_text(_text({"id": position_id} | form))


async def _received(socket: WebSocket, kind: type[Asked]) -> Asked:
    message = await socket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1005), message.get("reason"))
    return kind.model_validate_json(message.get("text") or message.get("bytes") or "")


def _text(message: dict[str, Any]) -> str:
    return json.dumps(message, separators=(",", ":"))
