"""A server's life: listening at once, ready when loaded, draining when told to stop."""

import asyncio
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.request

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from probe_service import SERVICE, Probe, Running, running, start_server
from redis_process import free_port

from bench.fuzz.frames import exchange, start_call
from splitsam.common.errors import CheckpointError, DeviceLost
from splitsam.common.metrics import STATES, Metrics
from splitsam.common.process import run_service
from splitsam.common.settings import SettingsProblem
from splitsam.encoder_service.settings import EncoderSettings
from splitsam.v1 import encoder_pb2 as pb
from splitsam.v1 import encoder_pb2_grpc


@pytest.fixture
async def probe() -> Probe:
    return Probe()


def request(text: str = "") -> pb.EncodeImageRequest:
    return pb.EncodeImageRequest(image=text.encode())


async def test_health_follows_loading_by_service_name(probe: Probe, metrics: Metrics):
    probe.loaded.clear()
    async with running(probe, metrics) as server:
        for name in ("", SERVICE):
            assert await server.health_of(name) == "NOT_SERVING"
        probe.loaded.set()
        for name in ("", SERVICE):
            await server.until_health_is("SERVING", name)
            assert await server.health_of(name) == "SERVING"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await server.health_of("splitsam.v1.AnotherService")
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_the_state_is_a_metric(probe: Probe, metrics: Metrics):
    def state() -> list[str]:
        values = {name: metrics.registry.get_sample_value("splitsam_state", {"state": name}) for name in STATES}
        return [name for name, value in values.items() if value]

    probe.loaded.clear()
    async with running(probe, metrics) as server:
        assert state() == ["loading"]
        probe.loaded.set()
        await server.until_health_is("SERVING")
        assert state() == ["serving"]
        await server.begin_drain()
        assert state() == ["draining"]


async def test_a_lost_device_ends_the_server_at_once_and_turns_callers_away(probe: Probe, metrics: Metrics):
    task, address = await start_server(probe, metrics, "--drain-delay-ms", "60000", "--grace-ms", "600000")
    async with grpc.aio.insecure_channel(address) as channel:
        server = Running(task, address)
        await server.until_health_is("SERVING")
        probe.loss.set_result("an illegal memory access")
        for name in ("", SERVICE):
            await server.until_health_is("NOT_SERVING", name)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await encoder_pb2_grpc.EncoderServiceStub(channel).EncodeImage(request())
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        await server.channel.close()
    with pytest.raises(DeviceLost, match="an illegal memory access"):
        await task


async def test_a_call_while_loading_is_unavailable_and_says_when_to_retry(probe: Probe, metrics: Metrics):
    probe.loaded.clear()
    async with running(probe, metrics) as server:
        for rpc in (server.stub.EncodeImage(request()), server.stub.EncodeImages()):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await (rpc.read() if hasattr(rpc, "read") else rpc)
            error = caught.value
            assert error.code() == grpc.StatusCode.UNAVAILABLE
            info, retry = rpc_status.from_call(error).details
            assert error_details_pb2.ErrorInfo.FromString(info.value).reason == "NOT_READY"
            assert error_details_pb2.RetryInfo.FromString(retry.value).retry_delay.ToMilliseconds() > 0
            assert int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
        assert probe.calls == []
        probe.loaded.set()
        await server.until_health_is("SERVING")
        assert (await server.stub.EncodeImage(request())).cache_hit


async def test_a_late_event_loop_is_a_metric(probe: Probe, metrics: Metrics):
    def lateness_s() -> float:
        return metrics.registry.get_sample_value("splitsam_event_loop_lag_seconds")

    async with running(probe, metrics):
        async with asyncio.timeout(60):
            while lateness_s() < 0.1:
                time.sleep(0.3)  # noqa: ASYNC251 (that is what makes it late)
                await asyncio.sleep(0)
            while lateness_s() > 0.1:  # noqa: ASYNC110 (a gauge has no event)
                await asyncio.sleep(0.01)


async def test_a_signal_lets_the_running_call_finish_then_closes_the_service(probe: Probe, metrics: Metrics):
    async with running(probe, metrics) as server:
        answer = server.stub.EncodeImage(request("wait"))
        await probe.started.wait()
        await server.begin_drain()
        assert not server.task.done()
        probe.release.set()
        assert (await answer).cache_hit
        await server.task
    assert probe.closed_after_calls == [True]


async def test_no_call_begins_after_the_drain_began(probe: Probe, metrics: Metrics):
    async with running(probe, metrics) as server:
        answer = server.stub.EncodeImage(request("wait"))
        await probe.started.wait()
        await server.begin_drain()
        async with grpc.aio.insecure_channel(server.address) as channel:
            late = channel.unary_unary(f"/{SERVICE}/EncodeImage")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await late(b"")
        # gRPC itself answers CANCELLED when the call meets the very moment of the shutdown.
        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        probe.release.set()
        assert (await answer).cache_hit
    assert len(probe.calls) == 1


async def test_a_call_that_outlives_the_grace_is_cancelled(probe: Probe, metrics: Metrics):
    async with running(probe, metrics, "--grace-ms", "0") as server:
        answer = server.stub.EncodeImage(request("wait"))
        await probe.started.wait()
        server.ask_to_stop()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await answer
        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        await server.task
        await probe.finished.wait()
    assert len(probe.closed_after_calls) == 1


async def test_a_signal_while_loading_ends_the_server_unready(
    probe: Probe, metrics: Metrics, caplog: pytest.LogCaptureFixture
):
    probe.loaded.clear()
    async with running(probe, metrics) as server:
        server.ask_to_stop()
        await server.task
    assert probe.load_ended
    assert len(probe.closed_after_calls) == 1
    assert "ready" not in caplog.messages


async def test_a_load_that_fails_ends_the_server_with_its_error(probe: Probe, metrics: Metrics):
    probe.load_failure = CheckpointError("no such file")
    task, address = await start_server(probe, metrics)
    assert address
    with pytest.raises(CheckpointError, match="no such file"):
        await task
    assert len(probe.closed_after_calls) == 1


@pytest.mark.parametrize("flag", ["--port", "--metrics-port"])
async def test_a_taken_port_is_named(probe: Probe, metrics: Metrics, flag: str):
    with socket.create_server(("127.0.0.1", 0)) as holder:
        taken = str(holder.getsockname()[1])
        task, address = await start_server(probe, metrics, flag, taken)
        assert address == ""
        name = flag.removeprefix("--").replace("-", "_")
        with pytest.raises(SettingsProblem, match=rf"^{name}: .*{taken}"):
            await task


async def test_a_server_that_grpc_ended_is_no_process_that_nobody_can_call(probe: Probe, metrics: Metrics):
    task, address = await start_server(probe, metrics)
    async with grpc.aio.insecure_channel(address) as channel:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), wait_for_ready=True)
    path = b"/splitsam.v1\xff.EncoderService/EncodeImage"
    await exchange(address, start_call(path))
    with pytest.raises(DeviceLost, match="gRPC's server ended: UnicodeDecodeError"):
        await task


@pytest.mark.parametrize("host", ["a\nb", "\udcff", "", "127.0.0.1:1"])
async def test_a_host_that_is_none_is_refused_in_one_line(probe: Probe, metrics: Metrics, host: str):
    task, _ = await start_server(probe, metrics, "--host", host)
    with pytest.raises(SettingsProblem, match=r"^port: cannot listen on") as caught:
        await task
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="IPv6 is off")
async def test_metrics_listen_on_the_same_ipv6_host(probe: Probe, metrics: Metrics):
    port = free_port()
    async with running(probe, metrics, "--host", "[::1]", "--metrics-port", str(port)):
        with await asyncio.to_thread(urllib.request.urlopen, f"http://[::1]:{port}/metrics") as page:
            assert b"splitsam_" in page.read()


async def test_metrics_are_scraped_over_http(probe: Probe, metrics: Metrics):
    port = free_port()
    async with running(probe, metrics, "--metrics-port", str(port)) as server:
        await server.stub.EncodeImage(request())
        await server.stop()
    url = f"http://127.0.0.1:{port}/metrics"
    with await asyncio.to_thread(urllib.request.urlopen, url) as page:
        text = page.read().decode()
    assert 'splitsam_requests_total{code="OK",method="EncodeImage"} 1.0' in text


async def test_a_message_holds_the_largest_image_and_nothing_much_larger(probe: Probe, metrics: Metrics):
    limit = 2**20
    async with running(probe, metrics, "--max-image-bytes", str(limit)) as server:
        assert (await server.stub.EncodeImage(pb.EncodeImageRequest(image=b"x" * limit))).cache_hit
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await server.stub.EncodeImage(pb.EncodeImageRequest(image=b"x" * 2 * limit))
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_the_log_tells_the_life_of_the_server(probe: Probe, metrics: Metrics, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "splitsam.server")
    async with running(probe, metrics) as server:
        await server.stop()
    assert [record.message for record in caplog.records if record.name == "splitsam.server"] == [
        "listening",
        "ready",
        "draining",
        "stopped",
    ]


def test_a_process_with_another_parser_of_protobuf_does_not_start():
    result = subprocess.run(
        [sys.executable, "-m", "splitsam.encoder_service", "--port", "0"],
        env={**os.environ, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode != 0
    assert "only upb is supported" in result.stderr


def test_a_bad_setting_ends_the_process_with_one_line(capsys: pytest.CaptureFixture[str]):
    assert run_service(EncoderSettings, lambda settings, metrics: Probe(), ["--port", "70000"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: port:")
