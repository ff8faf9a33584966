"""When the gateway says that it is ready: by the health of real servers on loopback, whatever else they refuse."""

import asyncio
import contextlib
from dataclasses import dataclass

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from splitsam.gateway.app import open_gateway
from splitsam.gateway.errors import GatewayError
from splitsam.gateway.fetch import Fetcher
from splitsam.gateway.metrics import GatewayMetrics
from splitsam.gateway.settings import GatewaySettings
from splitsam.v1 import decoder_pb2_grpc, encoder_pb2, encoder_pb2_grpc, types_pb2

LIMIT_S = 20.0
NAMES = ("splitsam.v1.EncoderService", "splitsam.v1.DecoderService")


@dataclass
class Replica(encoder_pb2_grpc.EncoderServiceServicer, decoder_pb2_grpc.DecoderServiceServicer):
    """Both services, which answer nothing but their health and, without a refusal, their model."""

    serves: bool = True
    refusal: grpc.StatusCode | None = grpc.StatusCode.RESOURCE_EXHAUSTED

    async def GetModelInfo(self, request, context):  # noqa: N802 - gRPC's name
        if self.refusal is not None:
            await context.abort(self.refusal, "too many")
        model = types_pb2.ModelInfo(name="vit_t")
        return encoder_pb2.EncoderServiceGetModelInfoResponse(model=model)  # the decoder's has the same form


@contextlib.asynccontextmanager
async def running(*replicas):
    """Their ports."""
    async with contextlib.AsyncExitStack() as stack:
        ports = []
        for replica in replicas:
            server, checks = grpc.aio.server(), health.aio.HealthServicer()
            health_pb2_grpc.add_HealthServicer_to_server(checks, server)
            encoder_pb2_grpc.add_EncoderServiceServicer_to_server(replica, server)
            decoder_pb2_grpc.add_DecoderServiceServicer_to_server(replica, server)
            status = health_pb2.HealthCheckResponse
            for name in NAMES:
                await checks.set(name, status.SERVING if replica.serves else status.NOT_SERVING)
            ports.append(server.add_insecure_port("127.0.0.1:0"))
            await server.start()
            stack.push_async_callback(server.stop, None)
        yield ports


@contextlib.asynccontextmanager
async def gateway_before(encoders, decoders):
    settings = GatewaySettings(encoders=encoders, decoders=decoders)
    metrics = GatewayMetrics()
    gateway = open_gateway(settings, metrics, None, Fetcher(settings, metrics))  # nobody comes by a route
    try:
        yield gateway
    finally:
        await gateway.close()


def at(port):
    return f"127.0.0.1:{port}"


async def test_services_that_refuse_everything_else_are_ready():
    async with running(Replica()) as [port], gateway_before([at(port)], [at(port)]) as gateway:
        await gateway.check_ready()
        assert gateway.model == ""


async def test_model_is_remembered_while_it_is_not_told():
    replica = Replica(refusal=None)
    async with running(replica) as [port], gateway_before([at(port)], [at(port)]) as gateway:
        await gateway.check_ready()
        replica.refusal = grpc.StatusCode.RESOURCE_EXHAUSTED
        await gateway.check_ready()
        assert gateway.model == "vit_t"


async def test_token_that_is_not_accepted_is_said():
    async with (
        running(Replica(refusal=grpc.StatusCode.UNAUTHENTICATED)) as [port],
        gateway_before([at(port)], [at(port)]) as gateway,
    ):
        with pytest.raises(GatewayError, match="credentials") as caught:
            await gateway.check_ready()
        assert caught.value.status_code == 502


@pytest.mark.parametrize("away", ["encoder", "decoder"])
async def test_service_that_drains_is_not_ready(away):
    async with running(Replica(), Replica(serves=False)) as [up, draining]:
        encoder, decoder = (at(draining if name == away else up) for name in ("encoder", "decoder"))
        async with gateway_before([encoder], [decoder]) as gateway:
            with pytest.raises(GatewayError, match="try again") as caught:
                await gateway.check_ready()
        assert (caught.value.status_code, caught.value.reason) == (503, "NOT_READY")


async def test_one_replica_of_each_is_enough():
    async with (
        running(Replica(), Replica(serves=False)) as [up, draining],
        gateway_before([at(draining), at(up)], [at(up), at(draining)]) as gateway,
    ):
        await gateway.check_ready()


async def test_one_replica_behind_a_name_is_enough():
    """As with a headless Service, one name stands for two, and calls go to them in turn."""
    async with running(Replica(serves=False), Replica()) as [draining, up]:
        name = f"ipv4:{at(draining)},{at(up)}"
        async with gateway_before([name], [name]) as gateway:
            async with asyncio.timeout(LIMIT_S):
                while not await is_ready(gateway):  # noqa: ASYNC110 (connections make no event)
                    await asyncio.sleep(0.01)
            assert all([await is_ready(gateway) for _ in range(4)])


async def is_ready(gateway):
    try:
        await gateway.check_ready()
    except GatewayError:
        return False
    return True
