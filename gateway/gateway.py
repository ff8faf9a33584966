"""What the routes share: the services' client, settings, metrics, and room for images in memory."""

import asyncio
from dataclasses import dataclass

import grpc
from starlette.requests import HTTPConnection

from splitsam.client.async_client import AsyncClient
from splitsam.client.errors import SplitsamError
from splitsam.client.results import DeploymentInfo
from splitsam.common.tasks import gather_or_cancel
from splitsam.gateway.access import Access
from splitsam.gateway.encode_ahead import EncodeAhead
from splitsam.gateway.errors import from_service
from splitsam.gateway.fetch import Fetcher
from splitsam.gateway.image_slots import ImageSlots
from splitsam.gateway.label_tasks import TaskImages
from splitsam.gateway.metrics import GatewayMetrics
from splitsam.gateway.readiness import Readiness
from splitsam.gateway.settings import GatewaySettings

# Label Studio gives up on a health check after a second.
_PROBE_S = 0.8
_NOT_ALLOWED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


@dataclass
class Gateway:
    """One gateway process; nothing in it is of a caller, so that any replica can answer any request.

    Args:
        model: its name, as the services said it last; empty until they have.
        draining: set when the process is told to stop.
    """

    settings: GatewaySettings
    metrics: GatewayMetrics
    access: Access
    fetcher: Fetcher
    task_images: TaskImages
    encode_ahead: EncodeAhead
    client: AsyncClient
    image_slots: ImageSlots
    readiness: Readiness
    draining: bool = False
    model: str = ""

    async def close(self) -> None:
        await self.encode_ahead.close()
        await self.client.close()
        await self.readiness.close()

    async def check_ready(self) -> None:
        """Do nothing where an encoder and a decoder serve and accept this gateway's token, however busy they are.

        Raises:
            GatewayError: they do not.
        """
        await gather_or_cancel((self.readiness.check(_PROBE_S), self._learn_model()))

    async def _learn_model(self) -> None:
        """The name; where it is not told, only what is said of the token counts."""
        answer = await self._info(_PROBE_S)
        if isinstance(answer, DeploymentInfo):
            self.model = answer.encoder.model
        elif answer.code in _NOT_ALLOWED:
            raise from_service(answer)

    async def info(self, timeout_s: float) -> DeploymentInfo:
        """An encoder and those decoders that answer.

        Raises:
            GatewayError: no encoder does, or no decoder.
        """
        answer = await self._info(timeout_s)
        if isinstance(answer, SplitsamError):
            raise from_service(answer)
        return answer

    async def _info(self, timeout_s: float) -> DeploymentInfo | SplitsamError:
        decoders = await self.client.decoders(timeout_s=timeout_s)
        asked = (self.client.info(timeout_s=timeout_s, decoder=decoder) for decoder in decoders)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        found = [answer for answer in answers if isinstance(answer, DeploymentInfo)]
        if not found:
            error = next(answer for answer in answers if isinstance(answer, BaseException))
            if isinstance(error, SplitsamError):
                return error
            raise error
        return DeploymentInfo(found[0].encoder, tuple(decoder for each in found for decoder in each.decoders))


def gateway_of(connection: HTTPConnection) -> Gateway:
    gateway: Gateway = connection.app.state.gateway
    return gateway
