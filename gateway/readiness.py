"""Whether the services behind serve, by gRPC's health checks: no load and no quota of theirs has these refused."""

import asyncio
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from splitsam.client.aio_transport import AioTransport
from splitsam.client.connection import Connection
from splitsam.client.errors import SplitsamError, error_from_rpc
from splitsam.client.names import Address
from splitsam.common.tasks import gather_or_cancel
from splitsam.gateway.errors import from_service
from splitsam.v1 import decoder_pb2, encoder_pb2

_ENCODER = encoder_pb2.DESCRIPTOR.services_by_name["EncoderService"].full_name
_DECODER = decoder_pb2.DESCRIPTOR.services_by_name["DecoderService"].full_name
# Behind one address several replicas may take turns, and one of them may be about to go.
_TURNS = 3
_NOT_READY = SplitsamError("it does not serve", code=grpc.StatusCode.UNAVAILABLE, reason="NOT_READY", retry_delay_s=1.0)


class Readiness:
    """Asks every encoder and every decoder, for the running event loop."""

    def __init__(self, where: Connection):
        self._where = where
        self._transport = AioTransport(where)

    async def close(self) -> None:
        await self._transport.close()

    async def check(self, timeout_s: float) -> None:
        """Do nothing where an encoder serves, and a decoder.

        Raises:
            GatewayError: none of either does.
        """
        encoders = self._check_any(self._where.encoders, _ENCODER, timeout_s)
        await gather_or_cancel((encoders, self._check_any(self._where.decoders, _DECODER, timeout_s)))

    async def _check_any(self, given: Sequence[str], service: str, timeout_s: float) -> None:
        addresses = await self._transport.resolved(given, timeout_s)
        problems = await asyncio.gather(*(self._problem(address, service, timeout_s) for address in addresses))
        found = [problem for problem in problems if problem is not None]
        if len(found) == len(addresses):
            raise from_service(next((each for each in found if each.retry_delay_s is not None), found[0]))

    async def _problem(self, address: Address, service: str, timeout_s: float) -> SplitsamError | None:
        health = health_pb2_grpc.HealthStub(self._transport.line(address).channel)
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            async with asyncio.timeout(timeout_s):
                for _ in range(_TURNS):
                    answer = await health.Check(request)
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return None
        except grpc.RpcError as error:
            return error_from_rpc(error, address)
        except TimeoutError:
            return SplitsamError("no answer", code=grpc.StatusCode.DEADLINE_EXCEEDED, reason="DEADLINE_EXCEEDED")
        return _NOT_READY
