"""The gateway as an ASGI application: what goes around every request, and the routes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from splitsam.common.auth import Authenticator
from splitsam.gateway import documents, error_forms, images, masks, pointer, status
from splitsam.gateway.access import Access
from splitsam.gateway.gate import Gate
from splitsam.gateway.gateway import Gateway
from splitsam.gateway.metrics import GatewayMetrics
from splitsam.gateway.observed import BodyLimits, Observed
from splitsam.gateway.settings import GatewaySettings

ROUTERS = (images.router, masks.router, pointer.router, status.router, documents.router)
_SMALL_BYTES = 2**20


def build_app(settings: GatewaySettings, metrics: GatewayMetrics) -> FastAPI:
    """The application; its `state.gateway` is there while it runs.

    Raises:
        SettingsProblem: a file that the settings name cannot be used.
    """
    access = Access(Authenticator.from_file(settings.tokens_file), settings.allowed_origins)
    settings.check_files()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        gateway = open_gateway(settings, metrics, access)
        app.state.gateway = gateway
        yield
        await gateway.close()

    limits = {"/v1/images": settings.max_image_bytes}
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
        version=documents.VERSION,
        openapi_url=None,  # as `docs_url` and `redoc_url`, whose pages load scripts from elsewhere
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        middleware=[
            Middleware(Observed, metrics=metrics),
            cors,
            Middleware(Gate, access=access),
            Middleware(
                BodyLimits,
                max_bytes=limits,
                default_bytes=_SMALL_BYTES,
                timeout_s=settings.upload_timeout_ms / 1000,
            ),
        ],
    )
    for router in ROUTERS:
        app.include_router(router)
    error_forms.install(app)
    return app


def open_gateway(settings: GatewaySettings, metrics: GatewayMetrics, access: Access) -> Gateway:
    """The clients of the services, for the running event loop."""
    return Gateway(
        settings=settings,
        metrics=metrics,
        access=access,
        client=settings.open_client(),
        probes=tuple(settings.open_client((address,)) for address in settings.decoders),
        image_slots=asyncio.Semaphore(settings.max_images_in_work),
    )
