"""What is served, and whether it can be: for people, load balancers and Label Studio's own check."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from splitsam.gateway.errors import GatewayError
from splitsam.gateway.gateway import Gateway, gateway_of

router = APIRouter()
_INFO_S = 5.0


@router.get("/v1/info", summary="The model and the limits of the services behind")
async def info(request: Request) -> JSONResponse:
    """The encoder, the decoders that answer, and the most that one image may have."""
    gateway = gateway_of(request)
    found = await gateway.info(_INFO_S)
    services = [found.encoder, *found.decoders]
    answer: dict[str, Any] = {
        "services": [{name: value for name, value in asdict(each).items() if name != "address"} for each in services],
        "max_image_bytes": min(gateway.settings.max_image_bytes, found.encoder.limits["max_image_bytes"]),
    }
    return JSONResponse(answer)


@router.get("/livez", summary="Whether the gateway runs")
async def live() -> JSONResponse:
    """Says nothing of the services behind: restarting the gateway would not help them."""
    return JSONResponse({"status": "UP"})


@router.get("/readyz", summary="Whether the gateway can answer: it does not stop, an encoder and a decoder serve")
@router.get("/health", summary="The same, as Label Studio asks it")
async def ready(request: Request) -> JSONResponse:
    """503 while the gateway stops, or when no encoder or no decoder says within a second that it serves."""
    gateway: Gateway = gateway_of(request)
    if gateway.draining:
        raise GatewayError(503, "NOT_READY", "This gateway is stopping; try again in a moment.", retry_after_s=1.0)
    await gateway.check_ready()
    return JSONResponse({"status": "UP", "model_class": f"splitsam {gateway.model}".rstrip()})
