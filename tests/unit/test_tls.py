"""TLS in real handshakes: who is served, and what callers meet when certificates change under running calls."""

import asyncio
import socket
import ssl
import time
from pathlib import Path

import grpc
import pytest
from certificates import Authority, Pair, SecretVolume, flags, reloads, sample, server_files, trust
from grpc_health.v1 import health_pb2, health_pb2_grpc
from probe_service import Probe, running, start_server
from redis_process import free_port

from splitsam.common.settings import SettingsProblem
from splitsam.v1 import encoder_pb2 as pb
from splitsam.v1 import encoder_pb2_grpc

LIMIT_S = 20.0


@pytest.fixture
async def probe() -> Probe:
    return Probe()


async def ask(address: str, credentials: grpc.ChannelCredentials | None, **options: str) -> grpc.StatusCode:
    """How one call over a connection of its own ends."""
    settings = [("grpc.use_local_subchannel_pool", 1), *((f"grpc.{name}", value) for name, value in options.items())]
    if credentials is None:
        channel = grpc.aio.insecure_channel(address, settings)
    else:
        channel = grpc.aio.secure_channel(address, credentials, settings)
    async with channel:
        try:
            await encoder_pb2_grpc.EncoderServiceStub(channel).EncodeImage(pb.EncodeImageRequest(), timeout=LIMIT_S)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK


def shown(address: str, authority: Pair, own: Pair | None, folder: Path) -> str:
    """The name in the certificate that a server shows a new connection."""
    context = ssl.create_default_context(cadata=authority.cert_pem.decode())
    context.set_alpn_protocols(["h2"])
    if own is not None:
        (folder / "own.pem").write_bytes(own.cert_pem + own.key_pem)
        context.load_cert_chain(folder / "own.pem")
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=LIMIT_S) as plain,
        context.wrap_socket(plain, server_hostname=host) as wrapped,
    ):
        return wrapped.getpeercert()["subject"][0][0][1]


async def until(condition) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110 (a metric makes no event)
            await asyncio.sleep(0.01)


async def test_tls_serves_who_trusts_it_and_nobody_else(
    probe, metrics, volume, authority, other_authority, caller_pair
):
    async with running(probe, metrics, *flags(volume), credentials=trust(authority)) as server:
        assert await ask(server.address, trust(authority)) == grpc.StatusCode.OK
        assert await ask(server.address, trust(authority, caller_pair)) == grpc.StatusCode.OK  # shown, not asked for
        assert await ask(server.address, trust(other_authority)) == grpc.StatusCode.UNAVAILABLE
        assert await ask(server.address, None) == grpc.StatusCode.UNAVAILABLE  # plaintext
        assert (
            await ask(server.address, trust(authority), ssl_target_name_override="elsewhere.example")
            == grpc.StatusCode.UNAVAILABLE
        )
    assert len(probe.calls) == 2


async def test_a_certificate_for_another_host_is_not_accepted(probe, metrics, tmp_path, authority):
    volume = SecretVolume(tmp_path / "tls", server_files(authority.issue("server", hosts=("encoder.example",))))
    task, address = await start_server(probe, metrics, *flags(volume))
    assert await ask(address, trust(authority)) == grpc.StatusCode.UNAVAILABLE
    named = {"ssl_target_name_override": "encoder.example"}
    assert await ask(address, trust(authority), **named) == grpc.StatusCode.OK
    task.cancel()
    await asyncio.wait([task])


async def test_a_plaintext_server_is_not_taken_for_one_with_tls(probe, metrics, authority):
    async with running(probe, metrics) as server:
        assert await ask(server.address, trust(authority)) == grpc.StatusCode.UNAVAILABLE
    assert probe.calls == []


async def test_mutual_tls_serves_only_callers_of_its_authority(
    probe, metrics, volume, authority, other_authority, caller_pair
):
    known = trust(authority, caller_pair)
    async with running(probe, metrics, *flags(volume, mutual=True), credentials=known) as server:
        assert await ask(server.address, known) == grpc.StatusCode.OK
        refused = {
            "no certificate": trust(authority),
            "of another authority": trust(authority, other_authority.issue("caller")),
            "signed by itself": trust(authority, Authority("caller")),
            "expired": trust(authority, authority.issue("caller", days=(-2, -0.1))),
            "of tomorrow": trust(authority, authority.issue("caller", days=(0.5, 2))),
            "plaintext": None,
        }
        for why, credentials in refused.items():
            assert await ask(server.address, credentials) == grpc.StatusCode.UNAVAILABLE, why
    assert len(probe.calls) == 1


async def test_a_certificate_that_expires_in_use_is_refused_by_callers(probe, metrics, tmp_path, authority):
    """Its server cannot know; callers do, and the metric says so before."""
    soon = 2.0 / 86_400
    volume = SecretVolume(tmp_path / "tls", server_files(authority.issue("server", days=(-1, soon))))
    task, address = await start_server(probe, metrics, *flags(volume))
    until_s = sample(metrics, "splitsam_certificate_expiry_seconds")
    codes = []
    async with asyncio.timeout(LIMIT_S):
        while grpc.StatusCode.UNAVAILABLE not in codes:
            codes.append(await ask(address, trust(authority)))
    assert time.time() >= until_s  # noqa: TID251 a certificate expires at a time of day
    task.cancel()
    await asyncio.wait([task])


async def test_a_new_certificate_is_shown_while_calls_go_on(
    probe, metrics, volume, authority, caller_pair, tmp_path, caplog: pytest.LogCaptureFixture
):
    known = trust(authority, caller_pair)
    async with running(probe, metrics, *flags(volume, mutual=True), credentials=known) as server:
        waiting = server.stub.EncodeImage(pb.EncodeImageRequest(image=b"wait"))
        stream = server.stub.EncodeImages()
        await stream.write(pb.EncodeImagesRequest(request_id=1))
        assert (await stream.read()).request_id == 1
        await probe.started.wait()
        assert await asyncio.to_thread(shown, server.address, authority, caller_pair, tmp_path) == "server"
        for number in range(3):
            volume.put(server_files(authority.issue(f"server {number}"), authority))
            await until(lambda number=number: reloads(metrics)[0] == number + 1)
            name = await asyncio.to_thread(shown, server.address, authority, caller_pair, tmp_path)
            assert name == f"server {number}"
        volume.put({"tls.crt": b"broken", "tls.key": b"broken", "ca.crt": b"broken"})
        await until(lambda: reloads(metrics)[1] == 1)
        assert await asyncio.to_thread(shown, server.address, authority, caller_pair, tmp_path) == "server 2"
        assert await ask(server.address, known) == grpc.StatusCode.OK
        await stream.write(pb.EncodeImagesRequest(request_id=2))
        assert (await stream.read()).request_id == 2
        assert not waiting.done()
        probe.release.set()
        assert (await waiting).cache_hit
        stream.cancel()


async def test_a_new_authority_of_callers_ends_the_old_ones_new_connections(
    probe, metrics, volume, server_pair, authority, other_authority, caller_pair
):
    async with running(
        probe, metrics, *flags(volume, mutual=True), credentials=trust(authority, caller_pair)
    ) as served:
        volume.put(server_files(server_pair, other_authority))
        await until(lambda: reloads(metrics)[0] == 1)
        assert await ask(served.address, trust(authority, other_authority.issue("caller"))) == grpc.StatusCode.OK
        assert await ask(served.address, trust(authority, caller_pair)) == grpc.StatusCode.UNAVAILABLE
        await served.health_of("")  # the open connection goes on


async def test_health_alone_is_served_in_plaintext_beside_tls(probe, metrics, volume, authority, caller_pair):
    port = free_port()
    arguments = [*flags(volume, mutual=True), "--health-port", str(port)]
    async with (
        running(probe, metrics, *arguments, credentials=trust(authority, caller_pair)) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as plain,
    ):
        check = health_pb2_grpc.HealthStub(plain).Check
        for name in ("", Probe.full_name):
            assert (await check(health_pb2.HealthCheckRequest(service=name))).status == 1
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await encoder_pb2_grpc.EncoderServiceStub(plain).EncodeImage(pb.EncodeImageRequest())
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
        await server.begin_drain()
    assert probe.calls == []


async def test_a_taken_health_port_is_named(probe, metrics):
    with socket.create_server(("127.0.0.1", 0)) as holder:
        taken = str(holder.getsockname()[1])
        task, address = await start_server(probe, metrics, "--health-port", taken)
        assert address == ""
        with pytest.raises(SettingsProblem, match=rf"^health_port: .*{taken}"):
            await task
