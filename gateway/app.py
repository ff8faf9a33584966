"""The gateway as an ASGI application: what goes around every request, and the routes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from splitsam.common.auth import Authenticator
from splitsam.common.listeners import is_loopback
from splitsam.common.quotas import Quota, Quotas, read_quotas
from splitsam.gateway import (
    documents,
    error_forms,
    everything,
    images,
    label_studio,
    labeling_page,
    masks,
    osam,
    pointer,
    roboflow,
    status,
)
from splitsam.gateway.access import Access
from splitsam.gateway.bodies import SMALL_BYTES, json_limit
from splitsam.gateway.encode_ahead import EncodeAhead
from splitsam.gateway.fetch import Fetcher
from splitsam.gateway.gate import Gate
from splitsam.gateway.gateway import Gateway
from splitsam.gateway.image_slots import ImageSlots
from splitsam.gateway.label_tasks import TaskImages
from splitsam.gateway.metrics import GatewayMetrics
from splitsam.gateway.observed import BodyLimits, Observed
from splitsam.gateway.readiness import Readiness
from splitsam.gateway.settings import GatewaySettings

_MODULES = (images, masks, everything, pointer, status, label_studio, roboflow, osam, documents, labeling_page)
_DESCRIPTION = """Coordinates are pixels (x, y) of the upright image, (0, 0) its top left corner.

A WebSocket at /v1/pointer is for a pointer that hovers. Its first message is {"key"} with what else MasksRequest has of
formats and selection, and "token" where tokens are asked for; every other one is {"id"} with points, labels, box and
refinement_token. Each is answered once, with {"id", "masks", "ms"}, {"id", "superseded_by"} when a newer one took its
place, or {"id", "error"}; what is wrong with the first message is answered with {"error"}, and ends it."""
_IMAGE_IN_JSON = ("/sam2/embed_image", "/sam2/segment_image", "/api/generate")
_TASKS_BYTES = 16 * 2**20


def build_app(settings: GatewaySettings, metrics: GatewayMetrics) -> FastAPI:
    """The application; its `state.gateway` is there while it runs.

    Raises:
        SettingsProblem: a file that the settings name cannot be used.
    """
    authenticator = Authenticator(settings.tokens_file, metrics)
    share = Quota(settings.caller_requests_per_s, settings.caller_requests_in_flight)
    quotas = Quotas(share, read_quotas(settings.quotas_file), settings.max_connections)  # more of those never get here
    routes = [route for module in _MODULES for route in module.router.routes]
    access = Access(authenticator, settings.allowed_origins, is_loopback(settings.host), quotas, routes, metrics)
    settings.check_files()
    fetcher = Fetcher(settings, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        gateway = open_gateway(settings, metrics, access, fetcher)
        app.state.gateway = gateway
        watching = asyncio.create_task(authenticator.watch(settings.tokens_reload_ms / 1000))
        yield
        watching.cancel()
        await gateway.close()

    limits = {"/v1/images": settings.max_image_bytes}
    limits["/predict"] = limits["/setup"] = _TASKS_BYTES
    limits |= dict.fromkeys(_IMAGE_IN_JSON, json_limit(settings.max_image_bytes))
    cors = Middleware(
        CORSMiddleware,
        allow_origins=settings.allowed_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["authorization", "content-type", "x-request-id"],
        expose_headers=["retry-after", "x-request-id"],
    )
    app = FastAPI(
        title="splitsam gateway",
        summary="Open an image, click on it, get masks.",
        description=_DESCRIPTION,
        version=documents.VERSION,
        openapi_url=None,  # as `docs_url` and `redoc_url`, whose pages load scripts from elsewhere
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        middleware=[
            Middleware(Observed, metrics=metrics),
            cors,
            Middleware(
                BodyLimits,
                max_bytes=limits,
                default_bytes=SMALL_BYTES,
                timeout_s=settings.upload_timeout_ms / 1000,
            ),
            Middleware(Gate, access=access),
        ],
    )
    for module in _MODULES:
        app.include_router(module.router)
    error_forms.install(app)
    return app


def open_gateway(settings: GatewaySettings, metrics: GatewayMetrics, access: Access, fetcher: Fetcher) -> Gateway:
    """The clients of the services, for the running event loop."""
    client = settings.open_client()
    task_images = TaskImages(settings, fetcher, client)
    return Gateway(
        settings=settings,
        metrics=metrics,
        access=access,
        fetcher=fetcher,
        task_images=task_images,
        encode_ahead=EncodeAhead(settings, task_images, metrics),
        client=client,
        image_slots=ImageSlots(settings),
        readiness=Readiness(settings.service_connection()),
    )
