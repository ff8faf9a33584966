"""What the routes share: the services' client, settings, metrics, and room for images in memory."""

import asyncio
from dataclasses import dataclass

from starlette.requests import HTTPConnection

from splitsam.client.async_client import AsyncClient
from splitsam.client.errors import SplitsamError
from splitsam.client.results import DeploymentInfo
from splitsam.gateway.access import Access
from splitsam.gateway.encode_ahead import EncodeAhead
from splitsam.gateway.errors import from_service
from splitsam.gateway.fetch import Fetcher
from splitsam.gateway.image_slots import ImageSlots
from splitsam.gateway.label_tasks import TaskImages
from splitsam.gateway.metrics import GatewayMetrics
from splitsam.gateway.settings import GatewaySettings

# Label Studio gives up on a health check after a second.
_PROBE_S = 0.8


@dataclass
class Gateway:
    """One gateway process; nothing in it is of a caller, so that any replica can answer any request.

    Args:
        probes: a client for each decoder, to ask one after the other.
        draining: set when the process is told to stop.
    """

    settings: GatewaySettings
    metrics: GatewayMetrics
    access: Access
    fetcher: Fetcher
    task_images: TaskImages
    encode_ahead: EncodeAhead
    client: AsyncClient
    probes: tuple[AsyncClient, ...]
    image_slots: ImageSlots
    draining: bool = False

    async def close(self) -> None:
        await self.encode_ahead.close()
        for client in (self.client, *self.probes):
            await client.close()

    async def info(self, timeout_s: float = _PROBE_S) -> DeploymentInfo:
        """An encoder and those decoders that answer.

        Raises:
            GatewayError: no encoder does, or no decoder.
        """
        asked = (probe.info(timeout_s=timeout_s) for probe in self.probes)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        found = [answer for answer in answers if isinstance(answer, DeploymentInfo)]
        if not found:
            error = next(answer for answer in answers if isinstance(answer, BaseException))
            raise from_service(error) if isinstance(error, SplitsamError) else error
        return DeploymentInfo(found[0].encoder, tuple(decoder for each in found for decoder in each.decoders))


def gateway_of(connection: HTTPConnection) -> Gateway:
    gateway: Gateway = connection.app.state.gateway
    return gateway
