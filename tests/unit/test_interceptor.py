"""What surrounds every RPC, seen by a client: identity, request id, readiness, and errors it can act on."""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from certificates import sample
from google.rpc import code_pb2, error_details_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from probe_service import SERVICE, Probe, Running, running

from bench.fuzz.frames import DATA, END_STREAM, exchange, frame, start_call
from splitsam.common import errors
from splitsam.common.errors import InvalidArgument, QueueFull, ServiceError
from splitsam.common.metrics import Metrics
from splitsam.v1 import encoder_pb2 as pb

CLASSES = [kind for kind in ServiceError.__subclasses__() if kind is not InvalidArgument]
METHODS = ["EncodeImage", "DownloadEmbedding", "EncodeImages"]
TOKENS = {"acme": "acme-token-0123456789", "globex": "globex-token-01234567"}


@pytest.fixture
async def probe() -> Probe:
    return Probe()


@pytest.fixture
async def server(probe: Probe, metrics: Metrics) -> AsyncIterator[Running]:
    async with running(probe, metrics) as server:
        yield server


@pytest.fixture
def tenants(tmp_path: Path) -> list[str]:
    """Flags of a server that asks for tokens."""
    (tmp_path / "tokens").write_text("".join(f"{tenant} {token}\n" for tenant, token in TOKENS.items()))
    (tmp_path / "secret").write_text("0123456789abcdef")
    return ["--tokens-file", str(tmp_path / "tokens"), "--secret-file", str(tmp_path / "secret"), "--reflection"]


def call(server: Running, method: str, text: str = "", metadata: dict[str, str] | None = None):
    pairs = tuple((metadata or {}).items())
    if method == "EncodeImage":
        return server.stub.EncodeImage(pb.EncodeImageRequest(image=text.encode()), metadata=pairs)
    if method == "DownloadEmbedding":
        return server.stub.DownloadEmbedding(pb.DownloadEmbeddingRequest(embedding_key=text), metadata=pairs)
    requests = iter([pb.EncodeImagesRequest(request_id=1, image=text.encode())])
    return server.stub.EncodeImages(requests, metadata=pairs)


async def replies(rpc) -> list[object]:
    return [reply async for reply in rpc] if hasattr(rpc, "__aiter__") else [await rpc]


async def failure(rpc) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await replies(rpc)
    return caught.value


def details(error: grpc.aio.AioRpcError) -> dict[str, object]:
    """The rich status's messages by name."""
    status = rpc_status.from_call(error)
    found = {}
    for packed in status.details:
        message = getattr(error_details_pb2, packed.TypeName().rpartition(".")[2])()
        assert packed.Unpack(message)
        found[packed.TypeName().rpartition(".")[2]] = message
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    return found


def counted(metrics: Metrics, method: str, code: str) -> float:
    labels = {"method": method, "code": code}
    return metrics.registry.get_sample_value("splitsam_requests_total", labels) or 0.0


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
async def test_an_error_reaches_the_client_with_its_code_and_reason(server: Running, probe: Probe, kind):
    probe.failures["fail"] = kind("what to do", metadata={"limit": "3"})
    error = await failure(call(server, "EncodeImage", "fail", {"x-request-id": "id-1"}))
    assert (error.code(), error.details()) == (kind.code, "what to do")
    assert getattr(code_pb2, kind.code.name) == kind.code.value[0]
    found = details(error)
    assert found.keys() == {"ErrorInfo"}
    assert (found["ErrorInfo"].reason, found["ErrorInfo"].domain) == (kind.reason, "splitsam.v1")
    assert dict(found["ErrorInfo"].metadata) == {"limit": "3", "request_id": "id-1"}
    assert "grpc-retry-pushback-ms" not in dict(error.trailing_metadata())


def test_every_kind_of_error_has_a_reason_of_its_own():
    reasons = [kind.reason for kind in ServiceError.__subclasses__()]
    assert len(set(reasons)) == len(reasons)
    assert all(reason == reason.upper() for reason in reasons)


@pytest.mark.parametrize("method", METHODS)
async def test_an_error_with_a_delay_says_when_to_retry(server: Running, probe: Probe, metrics: Metrics, method: str):
    probe.failures["fail"] = QueueFull("too many wait", retry_delay_s=1.5)
    error = await failure(call(server, method, "fail"))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details(error)["RetryInfo"].retry_delay.ToMilliseconds() == 1500
    assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "1500"
    assert counted(metrics, method, "RESOURCE_EXHAUSTED") == 1


@pytest.mark.parametrize("method", METHODS)
async def test_a_bad_argument_names_its_field_by_path(server: Running, probe: Probe, method: str):
    probe.failures["fail"] = InvalidArgument("images[0].prompts[1].points[2].x", "is outside")
    error = await failure(call(server, method, "fail"))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    (violation,) = details(error)["BadRequest"].field_violations
    assert (violation.field, violation.description) == ("images[0].prompts[1].points[2].x", "is outside")


@pytest.mark.parametrize("method", METHODS)
async def test_a_defect_tells_the_client_nothing_and_the_log_everything(
    server: Running, probe: Probe, metrics: Metrics, caplog: pytest.LogCaptureFixture, method: str
):
    probe.failures["fail"] = ValueError("hunter2")
    error = await failure(call(server, method, "fail", {"x-request-id": "id-2"}))
    assert error.code() == grpc.StatusCode.INTERNAL
    assert "hunter2" not in f"{error.details()} {error.trailing_metadata()} {error.debug_error_string()}"
    assert details(error)["ErrorInfo"].reason == "INTERNAL"
    (line,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert (line.name, line.request_id) == ("splitsam.rpc", "id-2")
    assert "hunter2" in str(line.exc_info[1])
    assert counted(metrics, method, "INTERNAL") == 1


async def test_replies_sent_before_a_failure_arrive(server: Running, probe: Probe):
    probe.failures["fail"] = errors.EmbeddingExpired("gone")
    stream = call(server, "DownloadEmbedding", "fail")
    assert (await stream.read()).chunk == b"first"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream.read()
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("method", METHODS)
async def test_the_request_id_comes_back_and_is_on_the_log_line(
    server: Running, metrics: Metrics, caplog: pytest.LogCaptureFixture, method: str
):
    caplog.set_level(logging.INFO, "splitsam.rpc")
    rpc = call(server, method, metadata={"x-request-id": "id-3"})
    assert await replies(rpc)
    assert dict(await rpc.trailing_metadata())["x-request-id"] == "id-3"
    await server.stop()
    (line,) = [record for record in caplog.records if record.name == "splitsam.rpc"]
    assert (line.request_id, line.method, line.code, line.tenant) == ("id-3", method, "OK", "default")
    assert counted(metrics, method, "OK") == 1


@pytest.mark.parametrize("given", ["é".encode(), b"\xff\xfe", b"a\nforged line", b"a\tb", b" "])
async def test_a_request_id_that_cannot_be_sent_back_or_breaks_the_log_is_replaced(
    server: Running, given: bytes, caplog
):
    caplog.set_level(logging.INFO, "splitsam.rpc")
    opening = start_call(f"/{SERVICE}/EncodeImage".encode(), [(b"x-request-id", given)])
    answer, hung_up = await exchange(server.address, opening + frame(DATA, END_STREAM, 1, bytes(5)), b"x-request-id")
    assert b"grpc-status\x010" in answer
    assert not hung_up
    [line] = [record for record in caplog.records if record.name == "splitsam.rpc"]
    assert line.request_id.isalnum()


@pytest.mark.parametrize(
    ("given", "kept"), [(b"Bearer any", "Bearer any"), ("é".encode(), ""), (b"\xff\xfe", ""), (b"a\tb", "")]
)
async def test_credentials_are_kept_for_calls_in_the_callers_name_where_they_can_be_sent(
    probe: Probe, server: Running, given: bytes, kept: str
):
    opening = start_call(f"/{SERVICE}/EncodeImage".encode(), [(b"authorization", given)])
    answer, _ = await exchange(server.address, opening + frame(DATA, END_STREAM, 1, bytes(5)), b"x-request-id")
    assert b"grpc-status\x010" in answer
    assert [call.authorization for call in probe.calls] == [kept]


async def test_a_call_without_a_request_id_gets_one_and_a_long_one_is_cut(server: Running):
    unnamed = [call(server, "EncodeImage") for _ in range(2)]
    given = {dict(await rpc.trailing_metadata())["x-request-id"] for rpc in unnamed}
    assert len(given) == 2
    long = call(server, "EncodeImage", metadata={"x-request-id": "x" * 500})
    assert dict(await long.trailing_metadata())["x-request-id"] == "x" * 64


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("given", [None, "Bearer acme-token-9999999999", TOKENS["acme"]], ids=["no", "unknown", "bare"])
async def test_a_call_without_a_known_token_is_refused(
    probe: Probe, metrics: Metrics, tenants: list[str], method: str, given: str | None
):
    metadata = {"x-request-id": "id-4"} | ({} if given is None else {"authorization": given})
    async with running(probe, metrics, *tenants) as server:
        error = await failure(call(server, method, metadata=metadata))
    assert error.code() == grpc.StatusCode.UNAUTHENTICATED
    assert details(error)["ErrorInfo"].reason == "UNAUTHENTICATED"
    assert dict(error.trailing_metadata())["x-request-id"] == "id-4"
    assert probe.calls == []
    assert counted(metrics, method, "UNAUTHENTICATED") == 1


@pytest.mark.parametrize("method", METHODS)
async def test_a_known_token_names_the_tenant_in_the_handler(
    probe: Probe, metrics: Metrics, tenants: list[str], method: str
):
    async with running(probe, metrics, *tenants) as server:
        named = {
            tenant: {"authorization": f"Bearer {token}", "x-request-id": tenant} for tenant, token in TOKENS.items()
        }
        rpcs = [call(server, method, metadata=named[tenant]) for tenant in ("acme", "globex") * 5]
        await asyncio.gather(*map(replies, rpcs))
    assert sorted(seen.tenant for seen in probe.calls) == ["acme"] * 5 + ["globex"] * 5
    assert all(seen.tenant == seen.request_id for seen in probe.calls)


async def test_health_needs_no_token_and_reflection_does(probe: Probe, metrics: Metrics, tenants: list[str]):
    async with running(probe, metrics, *tenants) as server:
        assert await server.health_of(SERVICE) == "SERVING"
        reflection = reflection_pb2_grpc.ServerReflectionStub(server.channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        error = await failure(reflection.ServerReflectionInfo(iter([question])))
        assert error.code() == grpc.StatusCode.UNAUTHENTICATED
        token = (("authorization", f"Bearer {TOKENS['acme']}"),)
        (answer,) = await replies(reflection.ServerReflectionInfo(iter([question]), metadata=token))
        assert SERVICE in {service.name for service in answer.list_services_response.service}


async def test_a_refusal_does_not_wait_for_the_request(probe: Probe, metrics: Metrics, tenants: list[str]):
    async with running(probe, metrics, *tenants) as server:
        silent = server.stub.EncodeImages()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await silent.read()
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


async def test_a_large_request_is_refused_before_it_is_read(probe: Probe, metrics: Metrics, tenants: list[str]):
    async with running(probe, metrics, *tenants) as server:
        error = await failure(call(server, "EncodeImage", "x" * 2**24))
    assert error.code() == grpc.StatusCode.UNAUTHENTICATED


async def test_a_large_request_that_there_is_no_room_for_is_refused_before_it_is_read(
    server: Running, probe: Probe, metrics: Metrics
):
    probe.room_failure = QueueFull("full", retry_delay_s=2.0)
    error = await failure(call(server, "EncodeImage", "x" * 2**24))
    assert details(error)["ErrorInfo"].reason == "QUEUE_FULL"
    assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "2000"
    assert probe.calls == []
    assert counted(metrics, "EncodeImage", "RESOURCE_EXHAUSTED") == 1


@pytest.mark.parametrize("method", METHODS)
async def test_a_tenant_over_its_quota_is_refused_and_another_is_served(
    probe: Probe, metrics: Metrics, tenants: list[str], tmp_path: Path, method: str
):
    (tmp_path / "quotas").write_text("globex 0 0\n")
    limits = ["--tenant-requests-in-flight", "1", "--quotas-file", str(tmp_path / "quotas")]
    acme, globex = ({"authorization": f"Bearer {token}"} for token in TOKENS.values())
    async with running(probe, metrics, *tenants, *limits) as server:
        first = asyncio.ensure_future(replies(call(server, method, "wait", acme)))
        await probe.started.wait()
        error = await failure(call(server, method, "", acme))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details(error)["ErrorInfo"].reason == "QUOTA_EXCEEDED"
        assert int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
        assert await replies(call(server, method, "", globex))
        probe.release.set()
        assert await first
        assert await replies(call(server, method, "", acme))
    labels = {"method": method, "reason": "QUOTA_EXCEEDED"}
    assert metrics.registry.get_sample_value("splitsam_refusals_total", labels) == 1


async def test_what_is_served_is_told_by_a_service_that_takes_no_more(probe: Probe, metrics: Metrics):
    limits = ["--max-requests-in-flight", "1", "--tenant-requests-in-flight", "1", "--tenant-requests-per-s", "0.01"]
    async with running(probe, metrics, *limits) as server:
        first = asyncio.ensure_future(replies(call(server, "EncodeImage", "wait")))
        await probe.started.wait()
        probe.room_failure = QueueFull("full")
        for _ in range(3):
            await server.stub.GetModelInfo(pb.EncoderServiceGetModelInfoRequest())
        assert (await failure(call(server, "EncodeImage"))).code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        probe.release.set()
        assert await first


async def test_many_messages_on_one_stream_are_no_way_around_a_quota(probe: Probe, metrics: Metrics):
    async with running(probe, metrics, "--tenant-requests-per-s", "10") as server:
        requests = iter([pb.EncodeImagesRequest(request_id=number) for number in range(13)])
        start_s = asyncio.get_running_loop().time()
        answers = await replies(server.stub.EncodeImages(requests))
        assert len(answers) == 13
        assert asyncio.get_running_loop().time() - start_s >= 0.3  # the call is one request, its messages are 13
        error = await failure(call(server, "EncodeImage"))
        assert details(error)["ErrorInfo"].reason == "QUOTA_EXCEEDED"


async def test_a_method_that_does_not_exist_leaves_no_trace_in_the_metrics(
    probe: Probe, metrics: Metrics, tenants: list[str]
):
    async with running(probe, metrics, *tenants) as server:
        for path in (f"/{SERVICE}/MadeUp", "/made.up.Service/MadeUp"):
            error = await failure(server.channel.unary_unary(path)(b""))
            assert error.code() == grpc.StatusCode.UNIMPLEMENTED
    samples = [sample for metric in metrics.registry.collect() for sample in metric.samples]
    assert not [sample for sample in samples if "MadeUp" in sample.labels.values()]


@pytest.mark.parametrize("method", METHODS)
async def test_a_cancelled_call_is_cancelled_in_the_handler_and_counted(
    probe: Probe, metrics: Metrics, caplog: pytest.LogCaptureFixture, method: str
):
    async with running(probe, metrics) as server:
        rpc = call(server, method, "wait")
        answered = asyncio.ensure_future(replies(rpc))
        await probe.started.wait()
        rpc.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answered
        await probe.finished.wait()
    assert counted(metrics, method, "CANCELLED") == 1
    assert counted(metrics, method, "OK") == 0
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_call_past_its_deadline_is_cancelled_in_the_handler(probe: Probe, metrics: Metrics):
    async with running(probe, metrics) as server:
        request = pb.EncodeImageRequest(image=b"wait")
        error = await failure(server.stub.EncodeImage(request, timeout=0.2))
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await probe.finished.wait()
    assert counted(metrics, "EncodeImage", "CANCELLED") == 1


async def test_a_stream_left_while_it_sends_is_closed_and_counted_once(
    probe: Probe, metrics: Metrics, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "splitsam")
    async with running(probe, metrics) as server:
        rpc = call(server, "DownloadEmbedding", "flood", {"x-request-id": "id-5"})
        for _ in range(20):
            await rpc.read()
        rpc.cancel()
        await probe.finished.wait()
    gc.collect()
    assert counted(metrics, "DownloadEmbedding", "CANCELLED") == 1
    ended, line = [record for record in caplog.records if record.name in ("splitsam.probe", "splitsam.rpc")]
    assert (ended.message, line.code, line.request_id) == ("flood ended", "CANCELLED", "id-5")


async def test_two_streams_on_one_channel_do_not_mix(server: Running, probe: Probe):
    probe.failures["fail"] = errors.EmbeddingExpired("gone")
    bad, good = call(server, "EncodeImages", "fail"), call(server, "EncodeImages", "fine")
    error, answers = await asyncio.gather(failure(bad), replies(good))
    assert error.code() == grpc.StatusCode.NOT_FOUND
    assert len(answers) == 1


async def test_a_revoked_token_lets_nobody_in_and_ends_streams_while_calls_that_run_go_on(
    probe: Probe, metrics: Metrics, tmp_path: Path, tenants: list[str]
):
    acme, globex = ({"authorization": f"Bearer {token}"} for token in TOKENS.values())
    async with running(probe, metrics, *tenants, "--tokens-reload-ms", "20") as server:
        stream = server.stub.EncodeImages(metadata=tuple(acme.items()))
        kept = server.stub.EncodeImages(metadata=tuple(globex.items()))
        for each in (stream, kept):
            await each.write(pb.EncodeImagesRequest(request_id=1))
            assert (await each.read()).request_id == 1
        waiting = asyncio.ensure_future(replies(call(server, "EncodeImage", "wait", acme)))
        await probe.started.wait()
        (tmp_path / "tokens").write_text(f"globex {TOKENS['globex']}\nnew a-new-token-0123456789\n")
        async with asyncio.timeout(20):
            while not sample(metrics, "splitsam_token_reloads_total", result="taken"):  # noqa: ASYNC110 (a metric makes no event)
                await asyncio.sleep(0.01)
        assert (await failure(call(server, "EncodeImage", "", acme))).code() == grpc.StatusCode.UNAUTHENTICATED
        assert await replies(call(server, "EncodeImage", "", {"authorization": "Bearer a-new-token-0123456789"}))
        await stream.write(pb.EncodeImagesRequest(request_id=2))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        await kept.write(pb.EncodeImagesRequest(request_id=2))
        assert (await kept.read()).request_id == 2
        kept.cancel()
        assert not waiting.done()
        probe.release.set()
        assert (await waiting)[0].cache_hit
    assert [each.tenant for each in probe.calls].count("acme") == 2
